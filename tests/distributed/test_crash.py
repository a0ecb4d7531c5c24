"""A run that is killed at any moment, also while it saves, goes on from its newest complete checkpoint."""

import json
import os
import random
import signal
import subprocess
import time

import pytest
import torch
from distributed.launch import ENVIRONMENT, command, job, launch, read

from trl_opsd.trainer.checkpoints import STATE_FILE


NUM_KILLS = int(os.environ.get("NUM_KILLS", "3"))
SETTINGS = {
    "teacher": "ema",
    "max_steps": 13 * NUM_KILLS,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 3,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "steps_per_generation": 3,
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("seed", [0])
def test_killed_runs_reach_the_same_weights(seed, tmp_path):
    jobs = [job("opsd", "full", "run", "auto", **SETTINGS)]
    expected = launch("single", jobs, tmp_path / "whole")["run"]

    folder, chance = tmp_path / "killed", random.Random(seed)
    output_dir = folder / "run" / "run"
    incomplete = 0
    for kill in range(NUM_KILLS):
        with (tmp_path / f"log-{kill}").open("w+") as log:
            process = subprocess.Popen(command("single", jobs, folder), env=ENVIRONMENT, stdout=log, stderr=log)
            before = newest(output_dir)
            while newest(output_dir) == before:
                assert process.poll() is None, (tmp_path / f"log-{kill}").read_text()[-3000:]
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        state = json.loads((output_dir / f"checkpoint-{newest(output_dir)}" / STATE_FILE).read_text())
        incomplete += not state["complete"]
    assert launch("single", jobs, folder)["run"]["loss"] == expected["loss"]

    found = read(folder / "run")
    for side in ("student", "teacher"):
        for name, value in expected[side].items():
            assert torch.equal(found[side][name], value), name
    print(f"{incomplete} of {NUM_KILLS} kills left an incomplete checkpoint")


def newest(output_dir):
    checkpoints = [path.parent.name for path in output_dir.glob(f"checkpoint-*/{STATE_FILE}")]
    return max((int(name.removeprefix("checkpoint-")) for name in checkpoints), default=0)
