"""Contenders, each in a process of its own, taking turns: only one computes at a time."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from threading import Timer
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
            What was measured once: on starting, in the first iteration, for memory, by the check.
        error (`str`, *optional*):
            Why there is nothing, or no more.
        no_memory (`bool`, *optional*, defaults to `False`):
            Whether that was for want of the device's memory.
        alone (`bool`, *optional*, defaults to `False`):
            Whether no other contender's process was there.
    """

    contender: str
    samples: list[dict[str, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    no_memory: bool = False
    alone: bool = False

    def median(self, key: str = "seconds") -> float | None:
        """Median over the timed iterations, `None` if the contender did not get through all of them."""
        return median(sample[key] for sample in self.samples) if self.samples and self.error is None else None

    def lacked_memory(self) -> bool:
        """Whether the device's memory was too small, or so full that iterations were held up."""
        return self.no_memory or any(sample.get("allocation_retries") for sample in self.samples)


class _Failed(Exception):
    """A contender gave up or died."""

    def __init__(self, reason: str, no_memory: bool = False, goes_on: bool = False):
        super().__init__(reason)
        self.no_memory, self.goes_on = no_memory, goes_on


class _Contender:
    """The process of a contender, started for its first case and whenever it has ended since."""

    def __init__(self, name: str, factory: str, threads: int | None, timeout: float | None, log: Path):
        self._name, self._factory, self._threads, self._log = name, factory, threads, log
        self._timeout = self._left = timeout
        self._timed_out = False
        self._process: subprocess.Popen[str] | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")

    def begin(self, case: dict[str, Any]) -> None:
        if self._process is None:
            self._start()
        self._left, self._timed_out = self._timeout, False
        self.send({"factory": self._factory, "contender": self._name, "case": case})

    def _start(self) -> None:
        environment = dict(os.environ)
        if self._threads is not None:
            environment |= {"OMP_NUM_THREADS": str(self._threads), "MKL_NUM_THREADS": str(self._threads)}
        with self._log.open("a") as stderr:
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

    def send(self, message: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead, which `receive` explains
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        started = time.monotonic()
        timer = None if self._left is None else Timer(self._left, self._time_out)
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            if timer is not None:
                timer.cancel()
        if self._left is not None:
            self._left = max(0.0, self._left - (time.monotonic() - started))
        if self._timed_out:
            raise _Failed(f"it had not finished after `timeout={self._timeout:g}` seconds")
        if not line:
            raise _Failed(_cause_of_death(self._process.wait()))
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise _Failed(reply["error"], reply["no_memory"], reply["goes_on"])
        return reply

    def _time_out(self) -> None:
        self._timed_out = True
        self._kill()

    def _kill(self) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        if self._process is None:
            return
        # Nothing it holds is wanted, so there is nothing to wait for
        self._kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        self._process = None


def _cause_of_death(status: int) -> str:
    if status >= 0:
        return f"its process ended with status {status}"
    hint = ", as when memory runs out" if -status == signal.SIGKILL else ""
    return f"its process was ended by {signal.Signals(-status).name}{hint}"


class Contenders:
    """
    The processes of a benchmark's contenders. They stay from case to case, and end with the `with` block.

    Args:
        factory (`str`):
            Import path of the function that runs a contender in its process, as in
            `"trl_opsd.bench.loss:serve"`. It is called with the contender's name, the case and a
            [`~trl_opsd.bench.channel.Channel`].
        names (`Sequence[str]`):
            Names, in the order of their turns.
        log_dir (`Path`):
            Folder for what the contenders write on their consoles.
        threads (`int`, *optional*):
            CPU threads of each contender.
        timeout (`float`, *optional*):
            Seconds that each may be waited for in one case.
    """

    def __init__(
        self,
        factory: str,
        names: Sequence[str],
        log_dir: Path,
        threads: int | None = None,
        timeout: float | None = None,
    ):
        self._processes = {
            name: _Contender(name, factory, threads, timeout, log_dir / f"{name}.log") for name in names
        }

    def __enter__(self) -> "Contenders":
        return self

    def __exit__(self, *args: Any) -> None:
        for process in self._processes.values():
            process.end()

    def run_case(
        self,
        case: dict[str, Any],
        repeats: int,
        warmups: int = 1,
        finally_ask: Sequence[str] = ("memory",),
        on_turn: Callable[[str, str], None] = lambda phase, name: None,
        on_round: Callable[[list[Row], list[str]], Any] = lambda rows, order: None,
    ) -> tuple[list[Row], list[str]]:
        """
        Measures the contenders, one iteration of each per round.

        A contender that fails keeps its reason, and the others go on.

        Args:
            case (`dict[str, Any]`):
                Settings for the factory, of JSON types.
            repeats (`int`):
                Number of rounds.
            warmups (`int`, *optional*, defaults to `1`):
                Number of rounds before them that do not count.
            finally_ask (`Sequence[str]`, *optional*, defaults to `("memory",)`):
                Commands of the rounds after them, whose answers are kept as facts.
            on_turn (`Callable[[str, str], None]`, *optional*):
                Called before every turn with what is done and whose turn it is.
            on_round (`Callable[[list[Row], list[str]], Any]`, *optional*):
                Called after every timed round with what there is so far.

        Returns:
            `tuple[list[Row], list[str]]`:
                One row per contender, and the contenders in the order in which their timed iterations ran.
        """
        rows = [Row(name, alone=len(self._processes) == 1) for name in self._processes]
        order: list[str] = []

        def turns(phase: str, command: str | None) -> Iterator[tuple[Row, dict[str, Any]]]:
            for row in rows:
                on_turn(phase, row.contender)
                if row.error is not None:
                    continue
                process = self._processes[row.contender]
                try:
                    if command is not None:
                        process.send(command)
                    yield row, process.receive()
                except _Failed as failure:
                    timed = len(row.samples)
                    when = f"failed after {timed} timed iterations" if timed else "does not run here"
                    row.error, row.no_memory = f"{when}: {failure}", failure.no_memory
                    if not failure.goes_on:
                        process.end()

        for process in self._processes.values():
            process.begin(case)
        for row, reply in turns("starting", None):
            row.facts.update(reply)
        for number in range(warmups):
            for row, reply in turns("warming up", "warmup"):
                if number == 0:
                    row.facts["first_seconds"] = reply["seconds"]
        for number in range(repeats):
            for row, reply in turns(f"round {number + 1} of {repeats}", "time"):
                order.append(row.contender)
                row.samples.append(reply)
            on_round(rows, order)
        for command in finally_ask:
            for row, reply in turns(command, command):
                row.facts.update(reply)
        for row in rows:
            if row.error is None:
                self._processes[row.contender].send(None)
        return rows, order
