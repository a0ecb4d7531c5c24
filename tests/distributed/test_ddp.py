"""Two processes train as one does: same losses, same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


SCRIPT = Path(__file__).with_name("train.py")


def run(launcher: list[str], arguments: list[str], output_dir: Path) -> dict:
    output_dir.mkdir()
    tests = str(SCRIPT.parents[1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONPATH": os.pathsep.join([tests, str(SCRIPT.parents[2])]),
    }
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *arguments, str(output_dir)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output_dir / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("method", "weights"), [("opsd", "lora"), ("opsdc", "full"), ("opsd-budget", "full")])
def test_two_processes_equal_one(method, weights, tmp_path):
    one = run([], [method, weights], tmp_path / "one")
    two = run(
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        [method, weights],
        tmp_path / "two",
    )
    assert one.pop("world") == [1, "NO"]
    assert two.pop("world") == [2, "MULTI_CPU"]
    one.pop("num_passes")
    first_rank, second_rank = two.pop("num_passes")
    assert first_rank == second_rank
    assert (max(first_rank) > 1) == (method == "opsd-budget")
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-5), name
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5)
