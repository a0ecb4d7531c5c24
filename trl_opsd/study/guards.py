"""
What guards see of the study's arms, and when they would stop them:

    python -m trl_opsd.study.guards

Trains the arms that are missing in the folder, which has to hold the study's bases, and prints the table of
docs/guards.md. The metrics of each step are kept in a file, so that other limits cost no other training.

    python -m trl_opsd.study.guards --curves outputs/methods/runs

How often the guard `benchmark` would have stopped the finished runs of a comparison, by their learning curves.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from ..eval.benchmark import Problem
from ..eval.in_training import BenchmarkCallback
from ..eval.statistics import proportion
from ..experiment.arms import BASE_SEED, BASES, TUNING_SEED
from ..experiment.train import Run, make_trainer, make_watch, write_result
from ..guard import GUARDS, Benchmark, Guard
from .arms import ARMS


# The first chose the limits, the second is what is reported
SEEDS = (1, 2)
# Points of accuracy below the best before that are a collapse, as in the study
MARGIN = 0.1
# Problems that `benchmark` is shown, none of which are the curve's
HELD_OUT = 200


@dataclass(frozen=True)
class Watched:
    """
    An arm that is watched.

    Args:
        arm (`str`):
            Its name.
        base (`str`):
            Name of its base.
        learning_rate (`float`):
            Rate it is trained at.
        steps (`int`):
            Steps after which it is ended; its schedule is that of the whole arm.
        every (`int`):
            Steps between two points of its learning curve, and between two evaluations.
    """

    arm: str
    base: str
    learning_rate: float
    steps: int
    every: int

    def name(self, seed: int) -> str:
        """Name of its file."""
        return f"{self.arm}-{self.base}-lr{self.learning_rate:g}-seed{seed}"


COLLAPSING = (
    Watched("opsd_live_long", "middling", 3e-4, 36, 3),
    Watched("opsdc_1", "verbose", 3e-5, 36, 3),
    Watched("opsd_clip", "middling", 1e-3, 30, 2),
)
LOSING = (Watched("opsdc_50", "verbose", 3e-5, 60, 6), Watched("opsdc_frozen", "verbose", 3e-5, 60, 6))
HEALTHY = (
    Watched("opsd", "middling", 3e-4, 80, 8),
    Watched("opsd_reverse_kl", "middling", 3e-4, 80, 8),
    Watched("opsd_jsd", "middling", 3e-4, 80, 8),
    Watched("opsd_sampled", "middling", 3e-4, 80, 8),
    Watched("opsd_answer", "middling", 1e-4, 80, 8),
    Watched("opsd", "weak", 1e-3, 80, 8),
)


def record(watched: Watched, seed: int, folder: Path) -> dict[str, Any]:
    """
    Train an arm and keep what each step measured, with the rewards of its rollouts, and evaluations on other problems
    than the curve's. Both leave the training as it is.

    Args:
        watched ([`Watched`]):
            The arm.
        seed (`int`):
            Its seed.
        folder (`Path`):
            Folder of the study, with the bases.

    Returns:
        `dict[str, Any]`: `"series"`, the metrics of each step, `"curve"`, the learning curve, and `"held_out"`, what
        was logged of the evaluations.
    """
    series: list[dict[str, float]] = []
    arm = ARMS[watched.arm]
    settings = {
        **arm.settings,
        "reward_funcs": "trl_opsd.playground.world.accuracy_reward",
        "per_device_eval_batch_size": HELD_OUT,
    }
    arm = replace(arm, settings=settings, evaluate_every=watched.every)
    spec = Run(BASES[watched.base], seed, arm, watched.learning_rate)
    rows = spec.base.family.make(BASE_SEED)
    problems = [
        Problem("held_out", str(number), row["prompt"][0]["content"], row["answer"])
        for number, row in enumerate(rows["tune"].select(range(HELD_OUT)))
    ]

    class Recorder(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            series.append({"step": state.global_step, **trainer.statistics["train"].latest})
            control.should_training_stop = state.global_step >= watched.steps

    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(spec, str(folder / "bases" / watched.base), rows["train"], output_dir)
        watch = make_watch(trainer, spec, rows)
        evaluate = BenchmarkCallback(
            trainer, {"held_out": problems}, steps=watched.every, sampling={"temperature": 1.0, "top_p": 0.95}
        )
        for callback in (Recorder(), watch, evaluate):
            trainer.add_callback(callback)
        with watch.counting():
            trainer.train()
        held_out = [logged for logged in trainer.state.log_history if "eval_held_out/avg@1" in logged]
    return {"series": series, "curve": watch.curve, "held_out": held_out}


def alarms(
    series: Sequence[Mapping[str, float]], held_out: Sequence[Mapping[str, float]] = ()
) -> dict[str, tuple[int, int]]:
    """
    The guards that would end a run with their default limits, by name.

    Args:
        series (`Sequence[Mapping[str, float]]`):
            Metrics of each step, with its number as `"step"`.
        held_out (`Sequence[Mapping[str, float]]`, *optional*):
            What was logged of the evaluations, likewise.

    Returns:
        `dict[str, tuple[int, int]]`: the step at which each would, and the one its trouble began with, the earliest
        first.
    """
    found: dict[str, tuple[int, int]] = {}
    for name, kind in GUARDS.items():
        guard = kind()
        if (ended := ends(guard, held_out if guard.reads_log else series)) is not None:
            found[name] = ended
    return dict(sorted(found.items(), key=lambda item: item[1]))


def ends(guard: Guard, seen: Sequence[Mapping[str, float]]) -> tuple[int, int] | None:
    """Where a guard would end a run that it sees so: the step, and the one its trouble began with."""
    for measured in seen:
        guard.observe(int(measured["step"]), {"skipped_steps": 0.0, **measured})
        if guard.has_trouble and guard.since is not None:
            return int(measured["step"]), guard.since
    return None


def collapse(curve: Sequence[Mapping[str, float]]) -> tuple[int, float] | None:
    """
    When an arm collapsed.

    Args:
        curve (`Sequence[Mapping[str, float]]`):
            Learning curve.

    Returns:
        `tuple[int, float]`, *optional*: the first step with an accuracy at least 10 points below the best before, and
        that best.
    """
    best = 0.0
    for point in curve:
        best = max(best, point["accuracy"])
        if point["accuracy"] <= best - MARGIN + 1e-9:
            return int(point["step"]), best
    return None


def row(watched: Watched, seed: int, recorded: Mapping[str, Any]) -> str:
    """A line of the table."""
    held_out, curve = recorded.get("held_out", ()), recorded["curve"]
    found, scores = alarms(recorded["series"], held_out), {its["step"]: its["eval_held_out/avg@1"] for its in held_out}
    fell = collapse(curve)
    first, best, last = curve[0], max(point["accuracy"] for point in curve), curve[-1]
    accuracy = f"{100 * first['accuracy']:.0f}, {100 * best:.0f}, {100 * last['accuracy']:.0f} at {last['step']}"
    cells = [f"{ARMS[watched.arm].title}, at {watched.learning_rate:g}", str(seed), accuracy]
    cells.append("–" if fell is None else str(fell[0]))

    def stop(names: Sequence[str]) -> str:
        if not names:
            return "never"
        share = "" if fell is None else f" ({found[names[0]][0] / fell[0]:.2f})"
        return f"{found[names[0]][0]}{share}"

    free = [name for name in found if name != "benchmark"]
    cells.append(stop(free) + "".join(f", `{name}`" for name in free[:1]))
    cells.append(stop([name for name in found if name == "benchmark"]) if held_out else "not shown")
    before = [point for point in curve if found and point["step"] < next(iter(found.values()))[1]]
    # As a rollback chooses: the last of the best
    back = max(before, key=lambda point: (scores.get(point["step"], 0.0), point["step"]), default=None)
    cells.append(f"{100 * back['accuracy']:.0f} at {back['step']}" if back else "–")
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| arm, at its rate | seed | accuracy: first, best, last, % | collapse | stop of the free guards, by | "
    "stop of `benchmark` | back to, % |\n|---|---|---|---|---|---|---|"
)


def evaluations(curve: Sequence[Mapping[str, float]], num_problems: int) -> list[dict[str, Any]]:
    """A learning curve by one sample of each problem, as evaluations are logged."""
    logged = []
    for point in curve:
        right = np.arange(num_problems) < round(point["accuracy"] * num_problems)
        its = proportion(right.astype(np.float64), np.ones(num_problems), num_problems)
        assert its is not None
        bounds = {"eval_curve/avg@1_low": its.low, "eval_curve/avg@1_high": its.high}
        logged.append({"step": point["step"], "eval_curve/avg@1": its.value, **bounds})
    return logged


def outcome(curve: Sequence[Mapping[str, float]]) -> str:
    """Whether a run lost 10 points, and kept that loss."""
    if collapse(curve) is None:
        return "never lost"
    return "lost" if curve[-1]["accuracy"] <= max(point["accuracy"] for point in curve) - MARGIN + 1e-9 else "regained"


def print_curves(folder: Path) -> None:
    """Print how many runs of a comparison `benchmark` would end, by seed, outcome, and what it is set to."""
    runs: Counter[tuple[int, str]] = Counter()
    ended: Counter[tuple[float, int, int, str]] = Counter()
    options = list(product((0.03, 0.05, 0.1), (1, 2, 3)))
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        its = result["settings"]["run"]
        if its["seed"] in (None, TUNING_SEED) or not result.get("curve"):
            continue
        kind = its["seed"], outcome(result["curve"])
        runs[kind] += 1
        seen = evaluations(result["curve"], BASES[its["base"]].family.splits["curve"].rows)
        for drop, patience in options:
            stop = ends(Benchmark(drop=drop, patience=patience), seen)
            ended[drop, patience, *kind] += stop is not None
    kinds = sorted(runs, key=lambda kind: (kind[1] != "never lost", kind[1] != "regained", kind[0]))
    print("| `drop` | `patience` |", *(f"{kind[1]}, seed {kind[0]} ({runs[kind]}) |" for kind in kinds))
    print("|---|---|" + "---|" * len(kinds))
    for drop, patience in options:
        print(f"| {drop:g} | {patience} |", *(f"{ended[drop, patience, *kind]} |" for kind in kinds))


def main(argv: Sequence[str] | None = None) -> int:
    """Records what is missing and prints the table, or prints that of a comparison's runs."""
    parser = argparse.ArgumentParser(prog="python -m trl_opsd.study.guards", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"), help="folder of the study")
    parser.add_argument("--report", action="store_true", help="print the table of what is there, and train nothing")
    parser.add_argument("--curves", type=Path, help="folder of a comparison's runs; nothing else is read or trained")
    args = parser.parse_args(argv)
    if args.curves is not None:
        print_curves(args.curves)
        return 0
    print(HEAD)
    for watched in COLLAPSING + LOSING + HEALTHY:
        for seed in SEEDS:
            path = args.output_dir / "guards" / f"{watched.name(seed)}.json"
            if not path.exists() and not args.report:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_result(path, record(watched, seed, args.output_dir))
            if path.exists():
                print(row(watched, seed, json.loads(path.read_text(encoding="utf-8"))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
