"""Token pages of a run on two processes: written once, of the rollouts of both."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from distributed.launch import ENVIRONMENT, RECIPES, TIMEOUT


def settings(folder, model_path):
    rows = [{"prompt": f"{n}+{n}=", "solution": f"Two times {n} are {2 * n}."} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": model_path,
        "dataset_name": str(folder / "rows.jsonl"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "max_completion_length": 6,
        "save_strategy": "no",
    }


def train(folder, backend, *flags):
    """A training command on two processes, launched by torchrun or with a recipe of accelerate."""
    if backend == "ddp":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    else:
        config = yaml.safe_load((RECIPES / f"{backend}.yaml").read_text())
        config |= {"use_cpu": True, "mixed_precision": "no", "num_processes": 2, "main_process_port": 0}
        (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    script = str(Path(__file__).with_name("command.py"))
    command = [sys.executable, *launcher, script, "opsd", "--config", str(folder / "opsd.yaml")]
    done = subprocess.run([*command, *flags], env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-5000:]


def student_prompts(page, tokenizer):
    [data] = re.findall(r'<script type="application/json" id="inspected">(.*?)</script>', page.read_text())
    data = json.loads(data)
    places = [np.frombuffer(base64.b64decode(its["student_prompt"]), dtype="<u2") for its in data["rollouts"]]
    return [tokenizer.decode([data["ids"][place] for place in own]) for own in places]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["ddp", "zero3"])
def test_pages_are_written_once_and_hold_rollouts_of_both(backend, tmp_path, model_path, tokenizer):
    (tmp_path / "opsd.yaml").write_text(yaml.safe_dump(settings(tmp_path, model_path)))
    train(tmp_path, backend, "--output_dir", str(tmp_path / "run"), "--inspect_steps", "2")
    [page] = (tmp_path / "run" / "inspect").iterdir()
    assert page.name == "step-000002.html"
    assert len(set(student_prompts(page, tokenizer))) == 4  # the whole batch, two rows of each process
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 3
