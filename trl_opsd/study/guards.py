"""
What guards see of the study's arms, and when they would stop them:

    python -m trl_opsd.study.guards

Trains the arms that are missing in the folder, which has to hold the study's bases, and prints the table of
docs/guards.md. The metrics of each step are kept in a file, so that other limits cost no other training.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..experiment.arms import BASE_SEED, BASES
from ..experiment.train import Run, make_trainer, make_watch, write_result
from ..guard import GUARDS
from .arms import ARMS


# The first chose the limits, the second is what is reported
SEEDS = (1, 2)
# Points of accuracy below the best before that are a collapse, as in the study
MARGIN = 0.1


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
            Steps between two points of its learning curve.
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
    Watched("opsd_live_long", "middling", 3e-4, 36, 6),
    Watched("opsdc_1", "verbose", 3e-5, 36, 6),
    Watched("opsd_clip", "middling", 1e-3, 50, 10),
)
HEALTHY = (
    Watched("opsd", "middling", 3e-4, 80, 80),
    Watched("opsd_reverse_kl", "middling", 3e-4, 80, 80),
    Watched("opsd_jsd", "middling", 3e-4, 80, 80),
    Watched("opsd_sampled", "middling", 3e-4, 80, 80),
    Watched("opsd_answer", "middling", 1e-4, 80, 80),
    Watched("opsdc_50", "verbose", 3e-5, 60, 12),
    Watched("opsdc_frozen", "verbose", 3e-5, 60, 12),
    Watched("opsd", "weak", 1e-3, 80, 80),
)


def record(watched: Watched, seed: int, folder: Path) -> dict[str, Any]:
    """
    Train an arm and keep what each step measured, with the rewards of its rollouts, which leave the training as it is.

    Args:
        watched ([`Watched`]):
            The arm.
        seed (`int`):
            Its seed.
        folder (`Path`):
            Folder of the study, with the bases.

    Returns:
        `dict[str, Any]`: `"series"`, the metrics of each step, and `"curve"`, the learning curve.
    """
    series: list[dict[str, float]] = []
    arm = ARMS[watched.arm]
    settings = {**arm.settings, "reward_funcs": "trl_opsd.playground.world.accuracy_reward"}
    arm = replace(arm, settings=settings, evaluate_every=watched.every)
    spec = Run(BASES[watched.base], seed, arm, watched.learning_rate)
    rows = spec.base.family.make(BASE_SEED)

    class Recorder(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            series.append({"step": state.global_step, **trainer.statistics["train"].latest})
            control.should_training_stop = state.global_step >= watched.steps

    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(spec, str(folder / "bases" / watched.base), rows["train"], output_dir)
        watch = make_watch(trainer, spec, rows)
        for callback in (Recorder(), watch):
            trainer.add_callback(callback)
        with watch.counting():
            trainer.train()
    return {"series": series, "curve": watch.curve}


def alarms(series: Sequence[Mapping[str, float]]) -> dict[str, tuple[int, int]]:
    """
    The guards that would end a run with their default limits, by name.

    Args:
        series (`Sequence[Mapping[str, float]]`):
            Metrics of each step, with its number as `"step"`.

    Returns:
        `dict[str, tuple[int, int]]`: the step at which each would, and the one its trouble began with, the earliest
        first.
    """
    found: dict[str, tuple[int, int]] = {}
    for name, kind in GUARDS.items():
        guard = kind()
        for measured in series:
            guard.observe(int(measured["step"]), {"skipped_steps": 0.0, **measured})
            if guard.has_trouble and guard.since is not None:
                found[name] = int(measured["step"]), guard.since
                break
    return dict(sorted(found.items(), key=lambda item: item[1]))


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
    found, curve = alarms(recorded["series"]), recorded["curve"]
    fell = collapse(curve)
    first, best, last = curve[0], max(point["accuracy"] for point in curve), curve[-1]
    accuracy = f"{100 * first['accuracy']:.0f}, {100 * best:.0f}, {100 * last['accuracy']:.0f} at {last['step']}"
    cells = [f"{ARMS[watched.arm].title}, at {watched.learning_rate:g}", str(seed), accuracy]
    cells.append("–" if fell is None else str(fell[0]))
    if not found:
        return f"| {' | '.join([*cells, 'never', '–', '–', '–'])} |"
    name, (stop, since) = next(iter(found.items()))
    before = [point for point in curve if point["step"] < since]
    kept = f"{100 * before[-1]['accuracy']:.0f} at {before[-1]['step']}" if before else "–"
    share = "–" if fell is None else f"{stop / fell[0]:.2f}"
    others = ", ".join(f"`{other}`" for other in found if other != name)
    by = f"`{name}`" + (f" (later {others})" if others else "")
    return f"| {' | '.join([*cells, str(stop), by, share, kept])} |"


HEAD = (
    "| arm, at its rate | seed | accuracy: first, best, last, % | collapse | stop | by | stop / collapse | "
    "back to, % |\n|---|---|---|---|---|---|---|---|"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Records what is missing, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m trl_opsd.study.guards", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"), help="folder of the study")
    parser.add_argument("--report", action="store_true", help="print the table of what is there, and train nothing")
    args = parser.parse_args(argv)
    print(HEAD)
    for watched in COLLAPSING + HEALTHY:
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
