"""What people look at after an evaluation: tables for the console and for markdown, JSON, and plots."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_opsd.eval.compare import Comparison
from trl_opsd.eval.metrics import Summary
from trl_opsd.eval.statistics import Estimate

from .plots import COLORS, GREY, add_legend, new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Rows(NamedTuple):
    """
    A table, before it is made for the console or for markdown.

    Args:
        title (`str`):
            Title.
        header (`list[str]`):
            Names of the columns.
        rows (`list[list[str]]`):
            Cells; the first names the row.
        notes (`list[str]`):
            Sentences to put below.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def summary_rows(name: str, summaries: Sequence[Summary]) -> Rows:
    """
    Makes the table of a run: one row per metric, one column per benchmark.

    Args:
        name (`str`):
            Name of the run.
        summaries (`Sequence[Summary]`):
            Its benchmarks.

    Returns:
        [`Rows`]:
            The table.
    """
    cells = [_cells(summary) for summary in summaries]
    metrics = sorted({metric for column in cells for metric in column})
    rows = [
        ["problems", *(f"{summary.num_problems:,}" for summary in summaries)],
        ["completions per problem", *map(_samples_per_problem, summaries)],
        *([metric[-1], *(column.get(metric, "–") for column in cells)] for metric in metrics),
        ["answer formats", *map(_formats, summaries)],
    ]
    notes = ["In brackets: 95 % interval over problems like these.", *(note for s in summaries for note in _notes(s))]
    return Rows(name, ["", *(summary.benchmark for summary in summaries)], rows, notes)


def comparison_rows(base_name: str, new_name: str, comparison: Comparison) -> Rows:
    """
    Makes the table of a comparison: one row per metric, with the interval of the difference where it is paired.

    Args:
        base_name (`str`):
            Name of the base run.
        new_name (`str`):
            Name of the other.
        comparison ([`Comparison`]):
            The comparison.

    Returns:
        [`Rows`]:
            The table.
    """
    base, new = _cells(comparison.base), _cells(comparison.new)
    p_value = "" if comparison.p_value is None else f", p = {comparison.p_value:.2g}"
    differences = {
        "avg@k": points(comparison.accuracy_difference) + p_value,
        "mean tokens": f"reduction {percent(comparison.length_reduction)}",
        "truncated": points(comparison.truncation_difference),
        "markers, also inside words": number(comparison.marker_substrings_difference, "+"),
        "marker words per 1k tokens": number(comparison.marker_words_per_1k_tokens_difference, "+"),
    }
    rows = [
        ["completions per problem", *map(_samples_per_problem, (comparison.base, comparison.new)), ""],
        *(
            [metric[-1], base.get(metric, "–"), new.get(metric, "–"), differences.get(metric[-1], "")]
            for metric in sorted(base.keys() | new.keys())
        ),
        ["answer formats", _formats(comparison.base), _formats(comparison.new), ""],
    ]
    changes = [change.change for change in comparison.changes]
    notes = [
        comparison.accuracy_verdict,
        comparison.length_verdict,
        f"Problems: {', '.join(f'{changes.count(kind)} {kind}' for kind in ('improved', 'worse', 'same'))}.",
    ]
    if comparison.num_left_out:
        notes.append(f"Left out because only one run has them: {comparison.num_left_out} problems.")
    for name, summary in ((base_name, comparison.base), (new_name, comparison.new)):
        notes += [f"{name}: {note}" for note in _notes(summary)]
    title = f"{comparison.benchmark}, {comparison.num_problems:,} problems"
    return Rows(title, ["", base_name, new_name, "difference"], rows, notes)


def show(rows: Rows, console: Console) -> None:
    """
    Prints a table with its notes.

    Args:
        rows ([`Rows`]):
            The table.
        console ([`~rich.console.Console`]):
            Where to print.
    """
    # As Text, so that nothing in a name is taken for markup.
    table = Table(title=Text(rows.title), title_justify="left")
    for index, name in enumerate(rows.header):
        table.add_column(Text(name), justify="right" if index else "left")
    for cells in rows.rows:
        table.add_row(*map(Text, cells))
    console.print(table)
    for note in rows.notes:
        console.print(Text(note))
    console.print()


def to_markdown(rows: Rows) -> str:
    """
    Makes a table for a markdown file.

    Args:
        rows ([`Rows`]):
            The table.

    Returns:
        `str`:
            Heading, table and notes.
    """

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rule = "|---|" + "---:|" * (len(rows.header) - 1)
    notes = "\n".join(f"- {note}" for note in rows.notes)
    return "\n".join([f"### {rows.title}", "", line(rows.header), rule, *map(line, rows.rows), "", notes, ""])


# Cells


def _cells(summary: Summary) -> dict[tuple[int, int, str], str]:
    """What to show, by position, number and name of the metric."""
    # All budgets are in the plot and in the JSON.
    budgets = [budget for budget in summary.accuracy_at_budget if budget.bit_count() == 1][-3:]
    return {
        (0, 0, "avg@k"): percent(summary.avg_at_k),
        **{(1, k, f"pass@{k}"): percent(estimate) for k, estimate in summary.pass_at_k.items() if k > 1},
        (2, 0, "majority@k"): percent(summary.majority_at_k),
        (3, 0, "accuracy among terminated"): percent(summary.accuracy_terminated),
        **{(4, b, f"accuracy within {b:,} tokens"): percent(summary.accuracy_at_budget[b]) for b in budgets},
        (5, 0, "mean tokens"): number(summary.mean_tokens),
        **{(6, q, f"{q}th percentile"): number(estimate) for q, estimate in summary.token_quantiles.items()},
        (7, 0, "truncated"): percent(summary.truncation_rate),
        (8, 0, "repetitive"): percent(summary.repetition_rate),
        (9, 0, "markers, also inside words"): number(summary.marker_substrings),
        (10, 0, "marker words"): number(summary.marker_words),
        (11, 0, "marker words per 1k tokens"): number(summary.marker_words_per_1k_tokens),
    }


def _interval(estimate: Estimate | None, shown: Callable[[float], str], unit: str = "") -> str:
    if estimate is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{shown(estimate.value)}{unit}"
    return f"{shown(estimate.value)}{unit} [{shown(estimate.low)}, {shown(estimate.high)}]"


def percent(estimate: Estimate | None) -> str:
    """A share with its interval, or a dash."""
    return _interval(estimate, lambda value: f"{100 * value:.1f}", " %")


def points(estimate: Estimate | None) -> str:
    """A difference of shares with its interval, or a dash."""
    return _interval(estimate, lambda value: f"{100 * value:+.1f}", " points")


def number(estimate: Estimate, sign: str = "") -> str:
    """A number with its interval."""
    largest = max(abs(value) for value in (estimate.value, estimate.low, estimate.high) if value is not None)
    digits = 0 if largest >= 100 else 1 if largest >= 10 else 2
    return _interval(estimate, lambda value: f"{value:{sign},.{digits}f}")


def _samples_per_problem(summary: Summary) -> str:
    fewest, most = summary.samples_per_problem
    return f"{fewest}" if fewest == most else f"{fewest} to {most}"


def _formats(summary: Summary) -> str:
    shares = sorted(summary.answer_formats.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares)


def _notes(summary: Summary) -> list[str]:
    notes = []
    fewest, most = summary.samples_per_problem
    if fewest != most:
        notes.append(
            f"{summary.benchmark} is unfinished: {fewest} to {most} completions per problem. pass@k goes up to the "
            "fewest, and lengths may be too short, since the shortest completions finish first."
        )
    if summary.num_ungraded:
        notes.append(
            f"{summary.benchmark}: {summary.num_ungraded:,} of {summary.num_samples:,} completions have no verdict, "
            "since their reference answer cannot be parsed. No accuracy counts them."
        )
    return notes


# Plots


def budget_plot(summaries: Mapping[str, Summary]) -> "Figure":
    """
    Draws accuracy against the token budget.

    Args:
        summaries (`Mapping[str, Summary]`):
            One benchmark, per name of the run.

    Returns:
        [`~matplotlib.figure.Figure`]:
            One curve per run, with its 95 % interval as a band.
    """
    figure, axes = new_figure()
    for (name, summary), color in zip(summaries.items(), cycle(COLORS), strict=False):
        points = sorted(summary.accuracy_at_budget.items())
        # From the first budget that suffices for anything: 0 % to the left of it goes without saying.
        points = [(budget, point) for budget, point in points if point.value > 0] or points
        budgets = [budget for budget, _ in points]
        axes.plot(budgets, [100 * point.value for _, point in points], "o-", color=color, markersize=4, label=name)
        lows, highs = (
            [100 * end for end in ends] for ends in zip(*(_ends(point) for _, point in points), strict=True)
        )
        axes.fill_between(budgets, lows, highs, color=color, alpha=0.15, linewidth=0)
    _token_axis(axes, "token budget")
    axes.set_ylabel("right within the budget (%)")
    axes.set_ylim(bottom=0)
    add_legend(axes)
    return figure


def length_plot(lengths: Mapping[str, Sequence[int]]) -> "Figure":
    """
    Draws how long completions are.

    Args:
        lengths (`Mapping[str, Sequence[int]]`):
            Tokens of each completion, per name of the run.

    Returns:
        [`~matplotlib.figure.Figure`]:
            One histogram per run over the same bins, each with its mean.
    """
    import numpy as np

    figure, axes = new_figure()
    everything = np.concatenate([np.asarray(tokens) for tokens in lengths.values()])
    # Edges at whole numbers, or short completions would fall into every other bin.
    bins = np.unique(np.geomspace(everything.min(), everything.max() + 1, 41).round()).tolist()
    for (name, tokens), color in zip(lengths.items(), cycle(COLORS), strict=False):
        weights = np.full(len(tokens), 100 / len(tokens))
        mean = float(np.mean(tokens))
        label = f"{name}, mean {mean:,.0f}"
        axes.hist(tokens, bins=bins, weights=weights, histtype="stepfilled", color=color, alpha=0.25)
        axes.hist(tokens, bins=bins, weights=weights, histtype="step", color=color, linewidth=1.5, label=label)
        axes.axvline(mean, color=color, linestyle="--", linewidth=1)
    _token_axis(axes, "length of a completion (tokens)")
    axes.set_ylabel("completions (%)")
    add_legend(axes)
    return figure


def change_plot(comparison: Comparison) -> "Figure":
    """
    Draws what changed problem by problem.

    Args:
        comparison ([`Comparison`]):
            The comparison, with at least one graded problem.

    Returns:
        [`~matplotlib.figure.Figure`]:
            One bar per problem, sorted.
    """
    figure, axes = new_figure()
    changes = sorted(comparison.changes, key=lambda change: change.new - change.base)
    positions = {
        kind: [i for i, c in enumerate(changes) if c.change == kind] for kind in ("worse", "same", "improved")
    }
    few = len(changes) <= 40
    for (kind, indices), color in zip(positions.items(), (COLORS[1], GREY, COLORS[0]), strict=True):
        heights = [100 * (changes[i].new - changes[i].base) for i in indices]
        axes.bar(indices, heights, width=0.9 if few else 1.0, color=color, label=f"{len(indices)} {kind}")
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_xlabel(f"{len(changes):,} problems, sorted")
    axes.set_ylabel("change of accuracy (points)")
    axes.margins(x=0.01)
    if few:
        axes.set_xticks(range(len(changes)), [change.problem_id for change in changes], rotation=90, fontsize=7)
    else:
        axes.set_xticks([])
    add_legend(axes)
    return figure


def save_plots(plots: "Mapping[str, Figure]", folder: Path) -> None:
    """
    Writes plots as PNG files.

    Args:
        plots (`Mapping[str, Figure]`):
            Plots, per name of the file.
        folder (`Path`):
            Where to write.
    """
    for name, figure in plots.items():
        figure.savefig(folder / f"{name}.png", dpi=120)


def _token_axis(axes: "Axes", label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    axes.set_xlabel(label)


def _ends(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high
