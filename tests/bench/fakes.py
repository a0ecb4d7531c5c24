"""Contenders that do next to nothing, or die doing it. They run in processes of their own."""

import os
import signal
import time
from pathlib import Path

import torch

from trl_opsd.bench.channel import CannotRun


compiled = []


def double(tensor):
    return 2 * tensor


def backend(graph, inputs):
    compiled.append(graph)
    return graph


def serve(name, case, channel):
    if name == "unable":
        raise CannotRun("it cannot do that")
    if name == "broken":
        raise RuntimeError("no such kernel\nand a long explanation")
    print("a library says hello")
    facts = {"pid": os.getpid()}
    if name == "compiling":
        torch.compile(double, backend=backend)(torch.ones(2))
        facts["compiled"] = len(compiled)
    channel.send(facts)
    timed = 0
    while (command := channel.receive()) is not None:
        if command == "time":
            timed += 1
            if name == "killed" and timed == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "raising" and timed == 2:
                raise ValueError("out of luck")
            if name == "greedy" and timed == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand a long explanation")
            if name == "slow" and timed == 2:
                time.sleep(600)
        with Path(case["journal"]).open("a") as journal:
            journal.write(f"{command} {name} begins\n")
            journal.flush()
            time.sleep(0.01)
            journal.write(f"{command} {name} ends\n")
        squeezed = name == "squeezed"
        channel.send(
            {"seconds": float(timed), "allocation_retries": int(squeezed)}
            if command != "memory"
            else {"peak_extra_bytes": 3}
        )
