"""Plots of learning curves."""

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .figures import Result


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AXES = {"generated_tokens": "generated tokens", "step": "optimizer step"}


def draw_curves(axes: Any, runs: Mapping[str, Mapping[int, Result]], name: str, x: str) -> bool:
    """
    Draws the learning curves of arms: the mean of the seeds in a band from the lowest to the highest.

    Args:
        axes ([`~matplotlib.axes.Axes`]):
            Where to draw.
        runs (`Mapping[str, Mapping[int, Result]]`):
            Results by seed, by what the arm is called.
        name (`str`):
            Figure of the points that is drawn.
        x (`str`):
            Figure that it is drawn over, `"generated_tokens"` or `"step"`. Arms in which it stays at zero are left
            out.

    Returns:
        `bool`:
            Whether there was something to draw.
    """
    from matplotlib.ticker import EngFormatter

    with_curve = {
        arm: [result["curve"] for result in done.values()]
        for arm, done in runs.items()
        if any(result["curve"] and result["curve"][-1][x] for result in done.values())
    }
    for index, (arm, its) in enumerate(with_curve.items()):
        # Points of the same step, over the seeds
        points = list(zip(*its, strict=False))
        xs = [fmean(point[x] for point in at_step) for at_step in points]
        ys = [fmean(point[name] for point in at_step) for at_step in points]
        (line,) = axes.plot(xs, ys, label=arm, color=f"C{index % 10}", linestyle="-" if index < 10 else "--")
        lows, highs = ([pick(point[name] for point in at_step) for at_step in points] for pick in (min, max))
        axes.fill_between(xs, lows, highs, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set_xlabel(_AXES[x])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return bool(with_curve)


def curves(runs: Mapping[str, Mapping[int, Result]], title: str, name: str, x: str, label: str) -> "Figure | None":
    """
    The learning curves of arms in one plot, see [`draw_curves`].

    Args:
        runs (`Mapping[str, Mapping[int, Result]]`):
            Results by seed, by what the arm is called.
        title (`str`):
            Title of the plot.
        name (`str`):
            Figure of the points that is drawn.
        x (`str`):
            Figure that it is drawn over.
        label (`str`):
            What the figure is called.

    Returns:
        [`~matplotlib.figure.Figure`] or `None`:
            The plot. `None` without a curve.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    if not draw_curves(axes, runs, name, x):
        return None
    axes.set_title(title)
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
