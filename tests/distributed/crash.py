"""Kills a training run again and again while it saves often, and lets it end at last. Started by test_crash.py.

The runs are forked from one process, because importing takes far longer than their few steps.
"""

import json
import multiprocessing
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from distributed.train import run

from trl_opsd.trainer.checkpoints import STATE_FILE, is_complete


def start(job: dict[str, Any], folder: Path) -> Any:
    process = multiprocessing.get_context("fork").Process(target=run, args=(job, folder / job["name"]))
    process.start()
    return process


def finish(job: dict[str, Any], folder: Path) -> None:
    process = start(job, folder)
    process.join()
    assert process.exitcode == 0


def steps(output_dir: Path) -> list[int]:
    """The steps at which there is a checkpoint, 0 for none."""
    files = output_dir.glob(f"checkpoint-*/{STATE_FILE}")
    return [0, *sorted(int(file.parent.name.removeprefix("checkpoint-")) for file in files)]


def crash(job: dict[str, Any], folder: Path, num_kills: int) -> dict[str, Any]:
    """Kill the run `num_kills` times, or until it reaches its end in spite of them."""
    output_dir, chance = folder / job["name"] / "run", random.Random(0)
    complete: list[bool] = []
    newest_complete = 0
    for kill in range(num_kills):
        before = steps(output_dir)[-1]
        process = start(job, folder)
        while process.is_alive() and steps(output_dir)[-1] == before:
            time.sleep(0.002)
        if kill % 2:  # the others hit the checkpoint that has just been begun
            time.sleep(chance.uniform(0, 0.4))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert int((folder / job["name"] / "first_step").read_text()) == newest_complete
        found = {step: is_complete(output_dir / f"checkpoint-{step}") for step in steps(output_dir)[1:]}
        complete.append(found[max(found)])
        newest_complete = max((step for step in found if found[step]), default=0)
    return {"complete": complete, "newest_complete": newest_complete}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    whole, killed = json.loads((folder / "jobs.json").read_text())
    finish(whole, folder)
    (folder / "crash.json").write_text(json.dumps(crash(killed, folder, num_kills=20)))
    finish(killed, folder)
