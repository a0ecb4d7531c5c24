"""What processes with vLLM's CPU build need, how they are started, and what all of these tests train."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from tiny import make_model, make_tokenizer


TESTS = Path(__file__).parents[1]
RECIPES = TESTS.parent / "recipes" / "accelerate"
# With these, processes find torchvision, which processors of images take
TORCHVISION = [Path(__file__).with_name("torchvision_on_cpu"), Path(sys.prefix, "torchvision")]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def environment(path: Sequence[Path] = (), **values: str) -> dict[str, str]:
    """Of a process that finds the tests, the library and what else is in `path`."""
    places = [TESTS, TESTS.parent, *path]
    return {**ENVIRONMENT, **values, "PYTHONPATH": os.pathsep.join(map(str, places))}


SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 16,
    "learning_rate": 0.05,
    "max_steps": 4,
}


def save_model(folder: Path, dtype: str = "float32", **overrides) -> None:
    """Save a tiny random model. vLLM's attention on the CPU needs heads of at least 32."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, **{"hidden_size": 64, "head_dim": 32, "intermediate_size": 64, **overrides})
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def dataset() -> Dataset:
    rows = [{"prompt": f"What is {a} + {7 * a}?", "solution": f"{a}+{7 * a}={8 * a}"} for a in range(1, 17)]
    return Dataset.from_list(rows)


def run_script(
    name: str, *arguments: str, num_processes: int = 1, recipe: str | None = None, path: Sequence[Path] = ()
) -> Any:
    """
    The result that a script beside this file saves, run by one process or by several: DDP's, or a recipe's. Modules
    are looked for in `path` too.
    """
    with tempfile.TemporaryDirectory() as results:
        launcher = []
        if recipe is not None:
            config = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
            config |= {"use_cpu": True, "mixed_precision": "no", "main_process_port": 0}
            config["num_processes"] = num_processes
            Path(results, "accelerate.yaml").write_text(yaml.safe_dump(config))
            launcher = ["-m", "accelerate.commands.launch", "--config_file", f"{results}/accelerate.yaml"]
        elif num_processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
        done = subprocess.run(
            [sys.executable, *launcher, str(Path(__file__).with_name(name)), *arguments],
            env=environment(path, RESULTS=results),
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        saved = [Path(results, f"{rank}.json").read_text() for rank in range(num_processes)]
    return json.loads(saved[0])


def save_result(result: Any) -> None:
    """Save what a script that [`run_script`] started has found, in a file: lines of several processes get mixed up."""
    Path(os.environ["RESULTS"], f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))


@contextmanager
def server(log: Path, *command: str, path: Sequence[Path] = ()) -> Iterator[tuple[str, subprocess.Popen]]:
    """Address and process of a server that a command starts, once it answers. Its processes are a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", str(port)],
            env=environment(path),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-5000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        else:
            raise TimeoutError(f"The server does not answer: {log.read_text()[-5000:]}")
        yield url, process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
