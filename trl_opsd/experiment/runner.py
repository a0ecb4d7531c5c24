"""Which runs there are, and running what is left of them: a few at a time, each in a process with one thread."""

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..files import locked
from .arms import BASES, TUNING_SEED, Arm
from .train import Run, write_result


# For the plan's hours, and run at once unless told otherwise
PROCESSES = 2


class Job(Protocol):
    """What is run, see [`~trl_opsd.experiment.train.Run`]."""

    @property
    def base(self) -> Any: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def arm(self) -> Arm | None: ...
    @property
    def learning_rate(self) -> float | None: ...
    @property
    def name(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def planned_seconds(self) -> float: ...
    @property
    def origin(self) -> "Job": ...
    def settings(self) -> dict[str, Any]: ...
    def score(self, result: Mapping[str, Any], origin: Mapping[str, Any]) -> float: ...


@dataclass(frozen=True)
class Plan:
    """
    Which runs there are.

    Args:
        known (`Mapping[str, Arm]`):
            Arms by their names, at least those that are run and those they are tuned or trained as.
        seeds (`tuple[int, ...]`):
            Seeds that are reported.
        learning_rates (`tuple[float, ...]`):
            Rates that every arm is tuned over. A single one is taken as it is.
        arms (`tuple[str, ...]`):
            Names of the arms.
        bases (`tuple[str, ...]`):
            Names of the bases.
        scale (`float`, *optional*, defaults to `1.0`):
            Share of the arms' steps and tokens that are taken.
    """

    known: Mapping[str, Arm]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    arms: tuple[str, ...]
    bases: tuple[str, ...]
    scale: float = 1.0

    def pairs(self) -> list[tuple[str, str]]:
        """Arms with each of their bases."""
        return [(arm, base) for arm in self.arms for base in self.known[arm].bases if base in self.bases]

    def is_trained(self, arm: str) -> bool:
        """Whether an arm is more than the base itself."""
        return self.known[arm].trainer != "none"

    def run(
        self, base: str, seed: int | None = None, arm: Arm | None = None, learning_rate: float | None = None
    ) -> Job:
        """A run on a base, or the training of the base itself."""
        return Run(BASES[base], seed, arm, learning_rate, self.scale if arm is not None else 1.0)

    def base_run(self, base: str) -> Job:
        """The training of a base."""
        return self.run(base)

    def base_runs(self) -> list[Job]:
        """The trainings of the bases."""
        used = {base for _, base in self.pairs()}
        return [self.base_run(base) for base in self.bases if base in used]

    def tuning_runs(self, arm: str, base: str) -> list[Job]:
        """The runs that an arm is tuned by."""
        if len(self.learning_rates) == 1 or not self.is_trained(arm):
            return []
        tuned = self.known[self.known[arm].tuned_as or arm]
        return [self.run(base, TUNING_SEED, tuned, rate) for rate in self.learning_rates]

    def reported_runs(self, arm: str, base: str, learning_rate: float | None) -> list[Job]:
        """The runs that are reported: one per seed, or a single one where nothing is trained."""
        trained = self.known[self.known[arm].trained_as or arm]
        seeds = self.seeds if self.is_trained(arm) else self.seeds[:1]
        return [self.run(base, seed, trained, learning_rate) for seed in seeds]


class Results:
    """
    The result files.

    Args:
        folder (`Path`):
            Folder of all runs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[Job, dict[str, Any] | None] = {}

    def path(self, run: Job) -> Path:
        """Where a run's result is."""
        return self.folder / "runs" / f"{run.name}.json"

    def get(self, run: Job) -> dict[str, Any] | None:
        """
        A run's result.

        Returns:
            `dict[str, Any]` or `None`:
                What it left, which has an `"error"` if it failed. `None` if it was not run, or with other settings, or
                if its file cannot be read.
        """
        if self._read.get(run) is None:
            result = _read(self.path(run))
            self._read[run] = result if result is not None and result["settings"] == run.settings() else None
        return self._read[run]

    def forget(self, run: Job) -> None:
        """Reads a run's file again the next time."""
        self._read.pop(run, None)

    def complete(self, run: Job) -> dict[str, Any] | None:
        """A run's result, `None` if there is none or it failed."""
        result = self.get(run)
        return None if result is None or "error" in result else result

    def score(self, run: Job) -> float | None:
        """
        What an arm is tuned for.

        Returns:
            `float` or `None`:
                See [`~trl_opsd.experiment.train.Run.score`]. `None` without a complete result.
        """
        result, origin = self.complete(run), self.complete(run.origin)
        return None if result is None or origin is None else run.score(result, origin)

    def learning_rate(self, plan: Plan, arm: str, base: str) -> float | None:
        """
        The rate an arm was tuned to: the best of the grid, the lower of two that are equal.

        Returns:
            `float` or `None`:
                The rate. `None` for an arm without training, or if no run of its tuning is complete.
        """
        if not plan.is_trained(arm):
            return None
        if len(plan.learning_rates) == 1:
            return plan.learning_rates[0]
        scores = {run.learning_rate: self.score(run) for run in plan.tuning_runs(arm, base)}
        finished = {rate: score for rate, score in scores.items() if score is not None}
        return max(finished, key=lambda rate: finished[rate]) if finished else None

    def is_tuned(self, plan: Plan, arm: str, base: str) -> bool:
        """Whether all runs of an arm's tuning were made, failed ones included."""
        return all(self.get(run) is not None for run in plan.tuning_runs(arm, base))

    def reported(self, plan: Plan, arm: str, base: str) -> dict[int, dict[str, Any]]:
        """The complete results of an arm that are reported, by seed."""
        if not self.is_tuned(plan, arm, base):
            return {}
        rate = self.learning_rate(plan, arm, base)
        if rate is None and plan.is_trained(arm):
            return {}
        runs = plan.reported_runs(arm, base, rate)
        return {
            run.seed: result for run in runs if run.seed is not None and (result := self.complete(run)) is not None
        }

    def of_arm(self, plan: Plan, arm: str, base: str) -> dict[int, dict[str, Any]]:
        """The same for any arm: nothing for one that is not planned, and the base itself with every seed."""
        if arm == "base":
            result = self.complete(plan.base_run(base))
            return {} if result is None else dict.fromkeys(plan.seeds, result)
        return self.reported(plan, arm, base) if (arm, base) in plan.pairs() else {}

    def num_reported(self, plan: Plan) -> tuple[int, int]:
        """How many of the runs that are reported are there, and how many there will be."""
        pairs = plan.pairs()
        finished = sum(len(self.of_arm(plan, arm, base)) for arm, base in pairs)
        return finished, sum(len(plan.reported_runs(arm, base, None)) for arm, base in pairs)

    def all(self, plan: Plan) -> dict[Job, dict[str, Any]]:
        """What all runs left that were made, also those that failed."""
        runs = plan.base_runs()
        for arm, base in plan.pairs():
            runs += plan.tuning_runs(arm, base)
            runs += plan.reported_runs(arm, base, self.learning_rate(plan, arm, base))
        return {run: result for run in runs if (result := self.get(run)) is not None}


def missing(finished: int, total: int) -> str:
    """What a page says of runs that are not there, nothing if all are."""
    return "" if finished == total else f"Not complete: {finished} of the {total} reported runs are there."


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def planned_seconds(plan: Plan) -> dict[str, tuple[int, float]]:
    """
    What a plan costs at most by the costs that were measured: as if no two arms were tuned to the same rate.

    Args:
        plan ([`Plan`]):
            The plan.

    Returns:
        `dict[str, tuple[int, float]]`:
            Runs and core-seconds of the bases, of tuning and of what is reported.
    """
    tuning = {run for arm, base in plan.pairs() for run in plan.tuning_runs(arm, base)}
    reported = [run for arm, base in plan.pairs() for run in plan.reported_runs(arm, base, None)]
    phases: dict[str, Iterable[Job]] = {"bases": plan.base_runs(), "tuning": tuning, "reported": reported}
    return {name: (len(list(runs)), sum(run.planned_seconds for run in runs)) for name, runs in phases.items()}


def run_plan(
    plan: Plan,
    folder: Path,
    max_hours: float | None = None,
    console: Console | None = None,
    execute: Callable[[Job, Path], None] | None = None,
    processes: int = PROCESSES,
) -> Results:
    """
    Runs what is left of a plan.

    A run that is complete is not run again, one that failed is. A run whose base or tuning failed is left out; the
    report says so.

    Args:
        plan ([`Plan`]):
            The plan.
        folder (`Path`):
            Where results go.
        max_hours (`float`, *optional*):
            Hours after which no run is started any more.
        console ([`~rich.console.Console`], *optional*):
            Console to write to.
        execute (`Callable[[Job, Path], None]`, *optional*):
            Makes a run and leaves its result file. By default in a process of its own.
        processes (`int`, *optional*, defaults to `2`):
            Runs at a time.

    Returns:
        [`Results`]:
            The results.

    Raises:
        ValueError: If others run in the folder, or the weights of a base are gone.
    """
    with locked(folder):
        return _run_plan(
            plan, Results(folder), max_hours, console or Console(), execute or execute_in_process, processes
        )


def _run_plan(
    plan: Plan,
    results: Results,
    max_hours: float | None,
    console: Console,
    execute: Callable[[Job, Path], None],
    processes: int,
) -> Results:
    deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
    for base in plan.base_runs():
        weights = results.folder / "bases" / base.base.name
        if results.complete(base) is not None and not weights.is_dir():
            raise ValueError(
                f"{results.path(base)} is there, and what it made is not ({weights}). Put it back, or "
                "choose another folder: a base that is trained again may be another one."
            )
    arms = {
        None,
        *(
            run.arm and run.arm.name
            for pair in plan.pairs()
            for run in plan.tuning_runs(*pair) + plan.reported_runs(*pair, None)
        ),
    }
    for path in (results.folder / "runs").glob("*.json"):
        left = _read(path)
        if left is not None and "error" in left and left["settings"]["run"]["arm"] in arms:
            path.unlink()

    def runnable() -> Iterator[Job]:
        yield from plan.base_runs()
        # Arm by arm, so that what is cut short has whole arms
        for arm, base in plan.pairs():
            if results.complete(plan.base_run(base)) is None:
                continue
            yield from plan.tuning_runs(arm, base)
            rate = results.learning_rate(plan, arm, base)
            if results.is_tuned(plan, arm, base) and (rate is not None or not plan.is_trained(arm)):
                yield from plan.reported_runs(arm, base, rate)

    with _progress(console) as progress, ThreadPoolExecutor(processes) as pool:
        total = sum(seconds for _, seconds in planned_seconds(plan).values())
        task = progress.add_task("Runs", total=total, status="")
        running: dict[Future[None], Job] = {}
        seen: set[Job] = set()
        while True:
            for run in runnable():
                if run in seen:
                    continue
                if results.get(run) is not None:
                    progress.advance(task, run.planned_seconds)
                elif deadline is not None and time.monotonic() > deadline:
                    break
                elif len(running) < processes:
                    progress.update(task, status=run.name)
                    running[pool.submit(execute, run, results.path(run))] = run
                else:
                    break
                seen.add(run)
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                done.result()
                run = running.pop(done)
                results.forget(run)
                outcome = results.get(run)
                if outcome is None or "error" in outcome:
                    why = "it left no result" if outcome is None else outcome["error"]
                    console.print(f"[red]{run.name} failed:[/red] {why}", highlight=False)
                progress.advance(task, run.planned_seconds)
    return results


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("{task.fields[status]}"),
        console=console,
        speed_estimate_period=1800,
    )


def execute_in_process(run: Job, path: Path) -> None:
    """
    Makes a run in a process of its own, with one thread.

    Args:
        run ([`Job`]):
            The run.
        path (`Path`):
            Its result file. What the process says goes to a `.log` beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    with path.with_suffix(".log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", run.module, str(path)],
            input=pickle.dumps(run),
            stdout=log,
            stderr=log,
            env={**os.environ, **threads},
        )
    if not path.is_file():
        # Killed, as when memory runs out: it could not leave its error itself
        error = f"its process ended with status {done.returncode}; see {path.with_suffix('.log')}"
        write_result(path, {"settings": run.settings(), "error": error})


def measured_ratio(plan: Plan, results: Results) -> float | None:
    """Core-seconds of the runs that are complete, over those planned for them. `None` before the first."""
    done = {run: result for run, result in results.all(plan).items() if "error" not in result}
    planned = sum(run.planned_seconds for run in done)
    return sum(result["cpu_seconds"] for result in done.values()) / planned if done else None
