"""The two plots of the comparison: accuracy against generated tokens, and against the length of answers."""

from collections.abc import Mapping
from statistics import fmean, mean
from typing import TYPE_CHECKING, Any

from ..experiment.arms import BASES
from ..experiment.figures import Result
from ..experiment.plots import draw_curves
from ..methods import METHODS
from .arms import ARMS, family_of


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Results of the arms that have some, by seed, and those of the base itself
Runs = Mapping[str, Mapping[int, Result]]

_GREY = "#9aa5b1"
_COLUMNS = 3
_MARKERS = "osD^vP*X<>phd8"


def _kind(arm: str) -> str:
    """What an arm is drawn with: methods of its family, or controls, TRL's trainers among them."""
    return str(family_of(ARMS[arm])) if arm in METHODS else "controls"


def accuracy_over_tokens(bases: Mapping[str, Runs]) -> "Figure | None":
    """
    The learning curves, a panel for the methods of a family on a base. GRPO is grey in all of them, and what SFT ends
    with, which generates nothing, is a broken line.

    Args:
        bases (`Mapping[str, Mapping[str, Mapping[int, Result]]]`):
            Results by base, arm and seed.

    Returns:
        [`~matplotlib.figure.Figure`] or `None`:
            The plot. `None` without a curve.
    """
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], dict[str, Mapping[int, Result]]] = {}
    for base, arms in bases.items():
        for arm, runs in arms.items():
            if arm not in ("grpo", "sft") and any(result["curve"] for result in runs.values()):
                panels.setdefault((base, _kind(arm)), {})[arm] = runs
    if not panels:
        return None
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(14, 3.6 * rows), layout="constrained")
    grid = list(figure.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False).flat)
    for axes, ((base, kind), arms) in zip(grid, sorted(panels.items(), key=lambda item: item[0]), strict=False):
        draw_curves(axes, {ARMS[arm].title: runs for arm, runs in arms.items()}, "accuracy", "generated_tokens")
        _draw_references(axes, bases[base])
        axes.set_title(f"{BASES[base].title}: {kind}", fontsize=9)
        axes.set_ylabel("accuracy")
        axes.set_ylim(0, 1)
        axes.legend(frameon=False, fontsize=7)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle("Accuracy on held-out problems against generated tokens")
    return figure


def _draw_references(axes: Any, arms: Runs) -> None:
    grpo, sft = arms.get("grpo", {}), arms.get("sft", {})
    points = list(zip(*(result["curve"] for result in grpo.values()), strict=False))
    if points:
        xs, ys = ([fmean(point[name] for point in at) for at in points] for name in ("generated_tokens", "accuracy"))
        axes.plot(xs, ys, color=_GREY, linewidth=3, zorder=0, label=ARMS["grpo"].title)
    if sft:
        end = fmean(result["curve"][-1]["accuracy"] for result in sft.values())
        axes.axhline(end, color=_GREY, linestyle=":", zorder=0, label=f"{ARMS['sft'].title}, at its end")


def accuracy_over_length(bases: Mapping[str, Runs], themselves: Mapping[str, Result]) -> "Figure | None":
    """
    Where every arm ends: accuracy and tokens per answer, both held out, a panel for each base. A family has a colour.
    Lines go from the lowest to the highest seed.

    Args:
        bases (`Mapping[str, Mapping[str, Mapping[int, Result]]]`):
            Results by base, arm and seed.
        themselves (`Mapping[str, Result]`):
            Results of the bases.

    Returns:
        [`~matplotlib.figure.Figure`] or `None`:
            The plot. `None` without a result.
    """
    from matplotlib.figure import Figure

    shown = {base: arms for base, arms in bases.items() if arms}
    if not shown:
        return None
    legend = 0.09 * max(len(arms) for arms in shown.values())
    figure = Figure(figsize=(14, 5.5 + legend), layout="constrained")
    for axes, (base, arms) in zip(figure.subplots(1, len(shown), squeeze=False).flat, shown.items(), strict=True):
        kinds: dict[str, list[str]] = {}
        for arm in arms:
            kinds.setdefault(_kind(arm), []).append(arm)
        for color, (kind, names) in enumerate(sorted(kinds.items())):
            for index, arm in enumerate(names):
                finals = [result["final"]["test"] for result in arms[arm].values()]
                lengths, shares = ([its[name] for its in finals] for name in ("mean_tokens", "accuracy"))
                x, y = mean(lengths), mean(shares)  # exact, so that no seed lies on the wrong side of it
                axes.errorbar(
                    x,
                    y,
                    xerr=[[x - min(lengths)], [max(lengths) - x]],
                    yerr=[[y - min(shares)], [max(shares) - y]],
                    fmt=_MARKERS[index % len(_MARKERS)],
                    color=f"C{color}" if kind != "controls" else _GREY,
                    markersize=7,
                    label=f"{ARMS[arm].title} ({kind})" if arm in METHODS else ARMS[arm].title,
                )
        if base in themselves:
            its = themselves[base]["final"]["test"]
            axes.plot(its["mean_tokens"], its["accuracy"], "k+", markersize=14, label="the base itself")
        axes.set_title(BASES[base].title)
        axes.set_xlabel("tokens per answer")
        axes.set_ylabel("accuracy on held-out problems")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.suptitle("Accuracy against the length of answers")
    return figure
