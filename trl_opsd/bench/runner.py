"""Contenders, each in a process of its own, taking turns: only one computes at a time."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any


@dataclass
class Row:
    """
    What is known about one contender in one case.

    Args:
        contender (`str`):
            Name.
        samples (`list[dict[str, float]]`):
            What each timed iteration gave, in order.
        facts (`dict[str, Any]`):
            What was measured once: on starting, for memory, by the check.
        error (`str`, *optional*):
            Why there is nothing, or no more.
    """

    contender: str
    samples: list[dict[str, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def median(self, key: str = "seconds") -> float | None:
        """Median over the timed iterations, `None` if the contender did not get through all of them."""
        return median(sample[key] for sample in self.samples) if self.samples and self.error is None else None


class _Failed(Exception):
    """A contender gave up or died."""


class _Contender:
    def __init__(self, name: str, factory: str, case: dict[str, Any], threads: int | None, log: Path):
        environment = dict(os.environ)
        if threads is not None:
            environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trl_opsd.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
                # Ctrl-C goes to this process alone, which then ends the contender and all that it started
                start_new_session=True,
            )
        self.send({"factory": factory, "contender": name, "case": case})

    def send(self, message: Any) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead, which `receive` explains
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise _Failed(_cause_of_death(self._process.wait()))
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise _Failed(reply["error"])
        return reply

    def end(self) -> None:
        # Nothing it holds is wanted, so there is nothing to wait for
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


def _cause_of_death(status: int) -> str:
    if status >= 0:
        return f"its process ended with status {status}"
    hint = ", as when memory runs out" if -status == signal.SIGKILL else ""
    return f"its process was ended by {signal.Signals(-status).name}{hint}"


def run_case(
    factory: str,
    contenders: Sequence[str],
    case: dict[str, Any],
    log_dir: Path,
    repeats: int,
    warmups: int = 1,
    finally_ask: Sequence[str] = ("memory",),
    threads: int | None = None,
    on_turn: Callable[[str, str], None] = lambda phase, name: None,
) -> tuple[list[Row], list[str]]:
    """
    Measures the contenders, one iteration of each per round.

    A contender that fails keeps its reason, and the others go on.

    Args:
        factory (`str`):
            Import path of the function that runs a contender in its process, as in
            `"trl_opsd.bench.loss:serve"`. It is called with the contender's name, the case and a
            [`~trl_opsd.bench.channel.Channel`].
        contenders (`Sequence[str]`):
            Names, in the order of their turns.
        case (`dict[str, Any]`):
            Settings for the factory, of JSON types.
        log_dir (`Path`):
            Folder for what the contenders write on their consoles.
        repeats (`int`):
            Number of rounds.
        warmups (`int`, *optional*, defaults to `1`):
            Number of rounds before them that do not count.
        finally_ask (`Sequence[str]`, *optional*, defaults to `("memory",)`):
            Commands of the rounds after them, whose answers are kept as facts.
        threads (`int`, *optional*):
            CPU threads of each contender.
        on_turn (`Callable[[str, str], None]`, *optional*):
            Called before every turn with what is done and whose turn it is.

    Returns:
        `tuple[list[Row], list[str]]`:
            One row per contender, and the contenders in the order in which their timed iterations ran.
    """
    rows = {name: Row(name) for name in contenders}
    order: list[str] = []
    with _contenders(factory, contenders, case, threads, log_dir) as processes:

        def turns(phase: str, command: str | None) -> Iterator[tuple[Row, dict[str, Any]]]:
            for name in contenders:
                on_turn(phase, name)
                if rows[name].error is not None:
                    continue
                try:
                    if command is not None:
                        processes[name].send(command)
                    yield rows[name], processes[name].receive()
                except _Failed as failure:
                    timed = len(rows[name].samples)
                    when = f"failed after {timed} timed iterations" if timed else "does not run here"
                    rows[name].error = f"{when}: {failure}"
                    processes[name].end()

        for row, reply in turns("starting", None):
            row.facts.update(reply)
        for _ in range(warmups):
            for _ in turns("warming up", "warmup"):
                pass
        for number in range(repeats):
            for row, reply in turns(f"round {number + 1} of {repeats}", "time"):
                order.append(row.contender)
                row.samples.append(reply)
        for command in finally_ask:
            for row, reply in turns(command, command):
                row.facts.update(reply)
    return list(rows.values()), order


@contextmanager
def _contenders(
    factory: str, names: Sequence[str], case: dict[str, Any], threads: int | None, log_dir: Path
) -> Iterator[dict[str, _Contender]]:
    processes: dict[str, _Contender] = {}
    try:
        for name in names:
            processes[name] = _Contender(name, factory, case, threads, log_dir / f"{name}.log")
        yield processes
    finally:
        for process in processes.values():
            process.end()
