"""What processes with vLLM's CPU build need, how they are started, and what all of these tests train."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from tiny import make_model, make_tokenizer


TESTS = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
}
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


def run_script(name: str, *arguments: str, num_processes: int = 1) -> Any:
    """The result that a script beside this file saves, run by one process or by several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    script = [*(launcher if num_processes > 1 else []), str(Path(__file__).with_name(name))]
    with tempfile.TemporaryDirectory() as results:
        done = subprocess.run(
            [sys.executable, *script, *arguments],
            env=ENVIRONMENT | {"RESULTS": results},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        saved = [Path(results, f"{rank}.json").read_text() for rank in range(num_processes)]
    return json.loads(saved[0])


def save_result(result: Any) -> None:
    """Save what a script that [`run_script`] started has found, in a file: lines of several processes get mixed up."""
    Path(os.environ["RESULTS"], f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))


@contextmanager
def server(log: Path, *command: str) -> Iterator[tuple[str, psutil.Popen]]:
    """Address and process of a server that a command starts, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = psutil.Popen(
            [sys.executable, "-m", *command, "--port", str(port)],
            env=ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-5000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield url, process
    finally:
        for child in [*process.children(recursive=True), process] if process.is_running() else []:
            child.kill()
