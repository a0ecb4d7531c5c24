"""The curves of training runs: what a run logged, a panel for what is read together."""

import re
from collections.abc import Iterable, Sequence
from itertools import cycle
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from .plots import COLORS, GREY, new_figure
from .runs import Run


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# As many runs are told apart
RUN_COLORS = (*COLORS, "#56b4e9", "#e69f00", "#8c6d5b")
_STYLES = ("-", "--", ":", "-.")
# Points that a curve of a panel has at most: means of neighbouring entries, if there are more
_MOST_POINTS = 400


class Panel(NamedTuple):
    """
    Metrics that are read together.

    Args:
        title (`str`):
            Title of the panel.
        unit (`str`):
            What the metrics are in. Shares, `"%"`, are drawn as such.
        over (`str`):
            What they are means over, as in docs/metrics.md.
        curves (`dict[str, str]`):
            Name in the log, and what it is called in the legend.
    """

    title: str
    unit: str
    over: str
    curves: dict[str, str]


PANELS = (
    Panel("Loss", "nats", "", {"loss": "optimized"}),
    Panel("Divergence from the teacher", "nats", "scored tokens", {"distillation_loss": "divergence, clipped"}),
    Panel("Entropy", "nats", "scored tokens", {"entropy": "student", "teacher_entropy": "teacher"}),
    Panel("Entropy gap", "nats", "scored tokens", {"entropy_gap": "student − teacher"}),
    Panel("Teacher's advantage", "nats", "scored tokens", {"teacher_advantage": "log p_T − log p_S, sampled tokens"}),
    Panel("Likelihood", "nats", "tokens that the likelihood term counts", {"likelihood_loss": "−log p_S"}),
    Panel(
        "Length of rollouts",
        "tokens",
        "samples",
        {
            "completions/mean_length": "mean",
            "completions/min_length": "least",
            "completions/max_length": "most",
        },
    ),
    Panel(
        "Rollouts that went wrong",
        "%",
        "the student's own rollouts with a token",
        {"rollouts/truncated_rate": "truncated", "rollouts/repetition_rate": "ends in a loop"},
    ),
    Panel(
        "Right rollouts",
        "%",
        "the student's own rollouts with a token and a reward",
        {"rollouts/correct_rate": "right"},
    ),
    Panel("Clipped", "%", "scored tokens", {"clipped_share": "with a clipped entry"}),
    Panel("Samples with a context", "%", "samples with at least one token", {"context_rate": "with a context"}),
)
_REWARD = re.compile(r"rewards/(.+)/mean")
_TEACHER = re.compile(r"teachers/(.+)/distillation_loss")
_ACCURACY = re.compile(r"eval_(.+)/(avg@\d+)")
# Not a measurement of the run, or in the table of what it cost
_NOT_DRAWN = {"step", "epoch", "total_flos", "num_tokens", "num_generated_tokens", "step_time"} | {
    "sampling/step_time",
    "memory/peak",
}


def names_of(runs: Iterable[Run]) -> list[str]:
    """Names of what the runs logged as numbers more than once, in the order in which they come."""
    counts: dict[str, int] = {}
    for run in runs:
        for name in dict.fromkeys(name for row in run.log for name in row):
            counts[name] = max(counts.get(name, 0), len(run.series(name)[0]))
    return [name for name, count in counts.items() if count and name not in _NOT_DRAWN]


def main_panels(runs: Sequence[Run]) -> list[Panel]:
    """The panels of [`PANELS`] that some run has a metric for, with those of its rewards."""
    names = names_of(runs)
    rewards = {name: match[1] for name in names if (match := _REWARD.fullmatch(name))}
    together = {"reward": "sum, weighted"} if len(rewards) != 1 else {}
    teachers = {name: match[1] for name in names if (match := _TEACHER.fullmatch(name))}
    guards = {name: name.removeprefix("guards/") for name in names if name.startswith("guards/")}
    panels = [
        *PANELS,
        Panel("Divergence from each teacher", "nats", "scored tokens of its rows", teachers),
        Panel("Reward", "", "samples", together | rewards),
        Panel("What guards saw", "in a row beyond the limits", "", guards),
    ]
    kept = [
        panel._replace(curves={name: label for name, label in panel.curves.items() if name in names})
        for panel in panels
    ]
    return [panel for panel in kept if panel.curves]


def missing_metrics(run: Run) -> list[str]:
    """What every run with a divergence logs, and this one, which has not said what it is, did not."""
    names = names_of([run])
    wanted = ("loss", "distillation_loss", "entropy", "completions/mean_length")
    return [name for name in wanted if name not in names] if run.log and not run.sessions else []


def benchmark_panels(runs: Sequence[Run]) -> list[Panel]:
    """Accuracy, length and truncation on each benchmark that was evaluated while training."""
    panels = []
    names = names_of(runs)
    for name in names:
        if match := _ACCURACY.fullmatch(name):
            panels.append(Panel(f"Accuracy on {match[1]}", "%", "problems", {name: match[2]}))
    for metric, title, unit in (("mean_tokens", "Length on", "tokens"), ("truncation_rate", "Truncated on", "%")):
        for name in names:
            if match := re.fullmatch(rf"eval_(.+)/{metric}", name):
                panels.append(Panel(f"{title} {match[1]}", unit, "problems", {name: metric.replace("_", " ")}))
    return panels


def other_panels(runs: Sequence[Run]) -> list[Panel]:
    """A panel for every other metric."""
    drawn = {name for panel in (*main_panels(runs), *benchmark_panels(runs)) for name in panel.curves}
    drawn |= {f"eval_{name}" for name in drawn} | {"reward"}
    bounds = re.compile(r"eval_.+/avg@\d+_(low|high)|train_(runtime|loss|.*_per_second)|eval_(runtime|.*_per_second)")
    return [
        Panel(name, "", "", {name: ""}) for name in names_of(runs) if name not in drawn and not bounds.fullmatch(name)
    ]


def draw(panel: Panel, runs: Sequence[Run]) -> "Figure":
    """
    Draws a panel. One run has a colour for each metric; several have a colour of `RUN_COLORS` each, which the legend
    leaves to the page, and a line style for each metric. What was measured in evaluations, whose names start with
    `eval_`, is drawn as points.

    Args:
        panel ([`Panel`]):
            What to draw.
        runs (`Sequence[Run]`):
            The runs.

    Returns:
        [`~matplotlib.figure.Figure`]:
            The panel.
    """
    from matplotlib.lines import Line2D

    figure, axes = new_figure(3.8, 2.5)
    scale = 100 if panel.unit == "%" else 1
    for run, of_run in zip(runs, cycle(RUN_COLORS), strict=False):
        for (name, label), of_metric, style in zip(panel.curves.items(), cycle(COLORS), cycle(_STYLES), strict=False):
            color, line = (of_metric, "-") if len(runs) == 1 else (of_run, style)
            parts = [run.name] * (len(runs) > 1) + [label] * (len(runs) == 1 or len(panel.curves) > 1)
            _draw_metric(axes, run, name, ", ".join(filter(None, parts)), scale, color, line)
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    if panel.unit in ("%", "tokens"):
        axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1)
    if len(runs) > 1:
        styles = zip(panel.curves.values(), cycle(_STYLES), strict=False)
        handles: list[Any] = [Line2D([], [], color=GREY, linestyle=style, label=label) for label, style in styles]
    else:
        handles = axes.get_legend_handles_labels()[0]
    if len(handles) > 1:
        legend = axes.legend(handles=handles, frameon=False, fontsize=8, loc="best")
        for text in legend.get_texts():
            text.set_parse_math(False)  # a metric's name may have dollars
    return figure


def _draw_metric(axes: "Axes", run: Run, name: str, label: str, scale: float, color: str, style: str) -> None:
    is_evaluation = name.startswith("eval_")
    steps, values = thinned(*run.series(name))
    if steps:
        marker = "o" if is_evaluation or len(steps) == 1 or name.startswith("guards/") else None
        shown = [scale * value for value in values]
        axes.plot(steps, shown, style, color=color, marker=marker, markersize=4, linewidth=1.5, label=label)
    lows, highs = (dict(zip(*run.series(f"{name}_{end}"), strict=True)) for end in ("low", "high"))
    if known := sorted(lows.keys() & highs.keys()):
        bottom, top = ([scale * its[step] for step in known] for its in (lows, highs))
        axes.fill_between(known, bottom, top, color=color, alpha=0.15, linewidth=0)
    if not is_evaluation and (evaluated := run.series(f"eval_{name}"))[0]:
        held_out = [scale * value for value in evaluated[1]]
        axes.plot(evaluated[0], held_out, "o", color=color, markersize=4, label=f"{label}, evaluation".lstrip(", "))


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """
    A curve with at most 400 points, each the mean of neighbouring ones.

    Args:
        steps (`Sequence[int]`):
            Steps of the points.
        values (`Sequence[float]`):
            Their values.

    Returns:
        `tuple[list[float], list[float]]`: steps and values.
    """
    width = -(-len(steps) // _MOST_POINTS) or 1
    starts = range(0, len(steps), width)
    some_steps, some_values = ([fmean(its[start : start + width]) for start in starts] for its in (steps, values))
    return some_steps, some_values
