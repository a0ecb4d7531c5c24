"""A run that is killed at any moment, also while it saves, goes on from its newest complete checkpoint."""

import json
import subprocess
import sys

import pytest
import torch
from distributed.launch import ENVIRONMENT, SCRIPT, TIMEOUT, job, read, write_jobs


MAX_STEPS = 16
SETTINGS = {
    "teacher": "ema",
    "max_steps": MAX_STEPS,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 3,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "steps_per_generation": 3,
}


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_runs_reach_the_same_weights(tmp_path):
    write_jobs(tmp_path, [job("opsd", "full", name, "auto", **SETTINGS) for name in ("whole", "killed")])
    run = [sys.executable, str(SCRIPT.with_name("crash.py")), str(tmp_path)]
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-5000:]

    crash = json.loads((tmp_path / "crash.json").read_text())
    assert crash["num_incomplete"] > 1
    assert crash["newest_complete"] > 0
    whole, killed = read(tmp_path / "whole"), read(tmp_path / "killed")
    assert len(whole["num_passes"][0]) == MAX_STEPS
    assert len(killed["num_passes"][0]) == MAX_STEPS - crash["newest_complete"]
    assert killed["loss"] == whole["loss"]
    for side in ("student", "teacher"):
        for name, value in whole[side].items():
            assert torch.equal(killed[side][name], value), name
