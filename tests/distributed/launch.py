"""Starting train.py under the recipes' accelerate configurations, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file


SCRIPT = Path(__file__).with_name("train.py")
TIMEOUT = 3600.0  # of a machine with much else to do
RECIPES = SCRIPT.parents[2] / "recipes" / "accelerate"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parents[2])]),
}


def job(
    method: str,
    weights: str,
    name: str = "",
    resume: str | None = None,
    model: str | None = None,
    images: str | None = None,
    rows: int = 4,
    shuffle: bool = True,
    packed: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """
    A training run: its folder, what it resumes from, the folder of its model, which rows have images ("some" or "all",
    none otherwise), rollouts of an optimizer step, whether a generation is shuffled before it is cut into
    micro-batches, whether a stand-in for flash attention has rows packed, and fields of the configuration.
    """
    return {
        "name": name or f"{method}-{weights}",
        "method": method,
        "weights": weights,
        "resume": resume,
        "model": model,
        "images": images,
        "rows": rows,
        "shuffle": shuffle,
        "packed": packed,
        "environment": {},
        "settings": settings,
    }


def with_deepspeed(job: dict[str, Any], name: str, **config: Any) -> dict[str, Any]:
    """A job with other values of `deepspeed_config` than the recipe's, handed on as `accelerate launch` does."""
    environment = {f"ACCELERATE_DEEPSPEED_{key.upper()}": str(value) for key, value in config.items()}
    return {**job, "name": f"{name}:{job['name']}", "environment": environment}


def launch(backend: str, jobs: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """
    Run jobs one after the other, on one process ("single") or on two.

    Returns what each wrote: `result.json`, and the weights of the student, of the teacher, and for vLLM.
    """
    done = subprocess.run(
        command(backend, jobs, folder), env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return {job["name"]: read(folder / job["name"]) for job in jobs}


def write_jobs(folder: Path, jobs: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))


def command(backend: str, jobs: list[dict[str, Any]], folder: Path) -> list[str]:
    """The command that runs jobs in a folder."""
    write_jobs(folder, jobs)
    if backend == "single":
        launcher = []
    elif backend == "ddp":  # accelerate would start a single process for a CPU world of several
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    else:
        name = "single" if backend == "MULTI_CPU" else backend
        config = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        config |= {"use_cpu": True, "mixed_precision": "no", "num_processes": 2, "main_process_port": 0}
        if backend == "MULTI_CPU":
            config["distributed_type"] = backend
        (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    return [sys.executable, *launcher, str(SCRIPT), str(folder)]


def read(folder: Path) -> dict[str, Any]:
    files = {name: folder / f"{name}.safetensors" for name in ("student", "teacher", "merged", "average")}
    return {
        **json.loads((folder / "result.json").read_text()),
        "first_step": int((folder / "first_step").read_text()),
        **{name: load_file(file) if file.exists() else {} for name, file in files.items()},
    }
