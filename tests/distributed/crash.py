"""Kills a training run again and again while it saves often, until it reaches its end. Started by test_crash.py.

The runs are forked from one process, because importing takes far longer than their few steps. They die at an access
to a file and not at a time, so that some die while they save, and all get on, on a machine of any speed.
"""

import gc
import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed.train import run

from trl_opsd.trainer.checkpoints import is_complete


ACCESSES = ("open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir")
MOST_ACCESSES = 60  # a checkpoint takes about 25


def run_until(num_accesses: int, job: dict[str, Any], folder: Path) -> None:
    """Train, and die at the given access to the run's checkpoints, unless the end comes first."""
    checkpoints = str(folder / "run" / "checkpoint-")

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal num_accesses
        if event in ACCESSES and str(arguments[0]).startswith(checkpoints):
            num_accesses -= 1
            if num_accesses == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    run(job, folder)


def exit_code(target: Callable[..., None], *arguments: Any) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def crash(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """
    Kill a run until it reaches its end all the same.

    Returns after how many kills there was an incomplete checkpoint, and the step from which the last run went on.
    """
    chance = random.Random(0)
    num_incomplete = newest_complete = 0
    first_step = folder / "first_step"  # left alone by a run that is killed before it
    folder.mkdir()
    first_step.write_text("0")
    while (code := exit_code(run_until, chance.randint(1, MOST_ACCESSES), job, folder)) != 0:
        assert code == -signal.SIGKILL
        assert int(first_step.read_text()) == newest_complete
        directories = (folder / "run").glob("checkpoint-*")
        found = {int(path.name.removeprefix("checkpoint-")): is_complete(path) for path in directories}
        num_incomplete += not all(found.values())
        newest_complete = max((step for step in found if found[step]), default=0)
        first_step.write_text(str(newest_complete))
    return {"num_incomplete": num_incomplete, "newest_complete": newest_complete}


if __name__ == "__main__":
    gc.freeze()  # the libraries, which the collection of every run would pass over
    folder = Path(sys.argv[1])
    whole, killed = json.loads((folder / "jobs.json").read_text())
    assert exit_code(run, whole, folder / whole["name"]) == 0
    (folder / "crash.json").write_text(json.dumps(crash(killed, folder / killed["name"])))
