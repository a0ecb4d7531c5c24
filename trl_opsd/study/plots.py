"""The plots of the study's report."""

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import TYPE_CHECKING

from .arms import ARMS, STEPS
from .claims import Result


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _curves(runs: Mapping[str, Mapping[int, Result]], title: str, name: str, x: str, label: str) -> "Figure | None":
    from matplotlib.figure import Figure

    with_curve = {
        arm: [result["curve"] for result in done.values()]
        for arm, done in runs.items()
        if any(result["curve"] and result["curve"][-1][x] for result in done.values())
    }
    if not with_curve:
        return None
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for index, (arm, curves) in enumerate(with_curve.items()):
        # Points of the same step, over the seeds
        points = list(zip(*curves, strict=False))
        xs = [fmean(point[x] for point in at_step) for at_step in points]
        ys = [fmean(point[name] for point in at_step) for at_step in points]
        (line,) = axes.plot(
            xs, ys, label=ARMS[arm].title, color=f"C{index % 10}", linestyle="-" if index < 10 else "--"
        )
        lows, highs = ([pick(point[name] for point in at_step) for at_step in points] for pick in (min, max))
        axes.fill_between(xs, lows, highs, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set_title(title)
    axes.set_xlabel({"generated_tokens": "generated tokens", "step": "optimizer step"}[x])
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _usual(runs: Mapping[str, Mapping[int, Result]], long: bool) -> dict[str, Mapping[int, Result]]:
    return {arm: done for arm, done in runs.items() if (ARMS[arm].steps == 5 * STEPS) == long}


Draw = Callable[[Mapping[str, Mapping[int, Result]], str], "Figure | None"]

_ACCURACY = "accuracy on held-out problems"
PLOTS: dict[str, tuple[tuple[str, str, Draw], ...]] = {
    "adding": (
        (
            "accuracy",
            "Accuracy against generated tokens",
            lambda runs, title: _curves(_usual(runs, False), title, "accuracy", "generated_tokens", _ACCURACY),
        ),
        (
            "long",
            "Accuracy over 5 times the usual steps",
            lambda runs, title: _curves(_usual(runs, True), title, "accuracy", "step", _ACCURACY),
        ),
    ),
    "brevity": (
        (
            "tokens",
            "Length against generated tokens",
            lambda runs, title: _curves(runs, title, "mean_tokens", "generated_tokens", "tokens per answer"),
        ),
        (
            "accuracy",
            "Accuracy against generated tokens",
            lambda runs, title: _curves(runs, title, "accuracy", "generated_tokens", _ACCURACY),
        ),
    ),
}
