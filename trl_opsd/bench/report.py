"""What people look at: a table per case, all numbers as JSON, and a plot."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from ..files import write_whole
from .runner import Row


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_SIZES = ("num_tokens", "hidden_size", "vocab_size")
_AXIS_LABELS = {"num_tokens": "tokens N", "hidden_size": "hidden size H", "vocab_size": "vocabulary V"}
_COLORS = {
    "ours": "#2f6fde",
    "ours-triton": "#1d4fa8",
    "ours-compiled": "#5289e6",
    "ours-eager": "#7aa7ef",
    "trl-chunked": "#d9822b",
    "liger": "#3a9d6e",
    "dense": "#b8405e",
    "floor": "#9aa5b1",
    "shared-prompt": "#2f6fde",
    "whole-sequences": "#b8405e",
}
_GENERATION, _WEIGHTS, _PEAK = "#c9d3de", "#9aa5b1", "#2f6fde"
_PARTS = {"preparation": "#d9822b", "forward": "#2f6fde", "backward": "#7aa7ef", "optimizer": "#3a9d6e"}


@dataclass
class CaseResult:
    """
    What was measured in one case.

    Args:
        case (`dict[str, Any]`):
            Settings.
        rows (`list[Row]`):
            One per contender.
        order (`list[str]`):
            Contenders in the order in which their timed iterations ran.
    """

    case: dict[str, Any]
    rows: list[Row]
    order: list[str]

    def with_rows(self, rows: Sequence[Row], order: Sequence[str]) -> "CaseResult":
        """The same with more rows, which replace those of the same contenders."""
        known = {row.contender: row for row in (*self.rows, *rows)}
        return CaseResult(self.case, list(known.values()), [*self.order, *order])

    def median_of(self, *names: str) -> float | None:
        """Median seconds of the first of some contenders that has one."""
        medians = {row.contender: row.median() for row in self.rows}
        return next((medians[name] for name in names if medians.get(name) is not None), None)


class Report(NamedTuple):
    """
    How a benchmark is shown.

    Args:
        table (`Callable[[CaseResult], Table]`):
            Makes the table of a case.
        plot (`Callable[[Sequence[CaseResult]], Figure]`):
            Draws all cases.
    """

    table: Callable[[CaseResult], Table]
    plot: Callable[[Sequence[CaseResult]], "Figure"]


def write_json(path: Path, record: dict[str, Any], results: Sequence[CaseResult]) -> None:
    """
    Writes all numbers.

    Args:
        path (`Path`):
            File to write.
        record (`dict[str, Any]`):
            What holds for all cases.
        results (`Sequence[CaseResult]`):
            The cases.
    """
    cases = [
        {
            "case": result.case,
            "order": result.order,
            "contenders": [
                {
                    **asdict(row),
                    "median": {key: row.median(key) for key in row.samples[0]} if row.median() is not None else None,
                }
                for row in result.rows
            ],
        }
        for result in results
    ]
    write_whole(path, json.dumps({**record, "cases": cases}, indent=2) + "\n")


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}" if value >= 0.1 else f"{value:.2g}"


def _ratio(value: float | None, reference: float | None) -> str:
    return "–" if value is None or not reference else f"{value / reference:.2f}×"


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:,.0f}"


def _range(row: Row, key: str = "seconds") -> str:
    values = [sample[key] for sample in row.samples]
    return f"{_seconds(min(values))} … {_seconds(max(values))}" if row.median() is not None else "–"


def _table(title: str, caption: str, columns: Sequence[str], result: CaseResult) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column != "contender" else "left", no_wrap=True)
    if any(row.error for row in result.rows):
        table.add_column("", justify="left")
    return table


# Loss


def loss_table(result: CaseResult) -> Table:
    """
    Makes the table of a case of the loss benchmark.

    Args:
        result ([`CaseResult`]):
            What was measured.

    Returns:
        [`~rich.table.Table`]:
            The table.
    """
    caption = "Forward and backward. Extra memory is beyond inputs and their gradients."
    checked = any("gradient_error" in row.facts for row in result.rows)
    columns = ["contender", "median s", "min … max", "× floor", "× ours", "peak extra MiB"]
    columns += ["kernel"] if any("kernel" in row.facts for row in result.rows) else []
    columns += ["gradient error"] if checked else []
    table = _table(_described(result.case), caption, columns, result)
    floor, own = result.median_of("floor"), result.median_of("ours", "ours-compiled", "ours-triton", "ours-eager")
    for row in result.rows:
        value = row.median()
        cells = [
            row.contender,
            _seconds(value),
            _range(row),
            _ratio(value, floor),
            _ratio(value, own),
            _mib(row.facts.get("peak_extra_bytes")),
        ]
        if "kernel" in columns:
            cells.append(row.facts.get("kernel", "–"))
        if checked:
            error = row.facts.get("gradient_error")
            cells.append("–" if error is None else f"{error:.0e}")
        table.add_row(*cells, *([row.error] if row.error else []))
    return table


def loss_plot(results: Sequence[CaseResult]) -> "Figure":
    """
    Draws bars for one case, lines over the swept size for several.

    Args:
        results (`Sequence[CaseResult]`):
            The cases.

    Returns:
        [`~matplotlib.figure.Figure`]:
            The figure: time on the left, memory on the right.
    """
    return _loss_bars(results[0]) if len(results) == 1 else _loss_lines(results)


def _described(case: dict[str, Any], without: str | None = None) -> str:
    parts = [case["divergence"]] + ([case["support"]] if case["support"] != "full" else [])
    parts += [f"{letter} = {case[size]:,}" for letter, size in zip("NHV", _SIZES, strict=True) if size != without]
    parts += [f"{case['dtype']} on {case['device']}", "frozen head" if case["frozen_head"] else "trained head"]
    parts += [f"clip {case['clip']:g}"] if case["clip"] is not None else []
    parts += [text for name, text in (("token_weights", "token weights"), ("metrics", "metrics")) if case[name]]
    return ", ".join(parts)


def _loss_bars(result: CaseResult) -> "Figure":
    figure = _bars_of(result, f"Divergence and gradients: {_described(result.case)}")
    floor = result.median_of("floor")
    if floor is not None:
        figure.axes[0].axvline(floor, color=_COLORS["floor"], linestyle=":", zorder=0)
    return figure


def _bars_of(result: CaseResult, title: str) -> "Figure":
    from matplotlib.figure import Figure

    rows = [row for row in result.rows if row.median() is not None]
    figure = Figure(figsize=(11, 1.4 + 0.45 * len(rows)), layout="constrained")
    figure.suptitle(title)
    time_axes, memory_axes = figure.subplots(1, 2, sharey=True)
    names = [row.contender for row in rows]
    _bars(time_axes, names, [row.median() or 0.0 for row in rows], _seconds, "median seconds")
    # The floor's memory is its buffers, made beforehand
    weighed = [row for row in rows if "peak_extra_bytes" in row.facts]
    values = [row.facts["peak_extra_bytes"] / 2**20 for row in weighed]
    _bars(memory_axes, [row.contender for row in weighed], values, lambda v: f"{v:,.0f}", "peak extra MiB")
    return figure


def _bars(
    axes: "Axes", names: Sequence[str], values: Sequence[float], label: Callable[[float], str], title: str
) -> None:
    bars = axes.barh(names, values, color=[_COLORS[name] for name in names], height=0.65)
    axes.bar_label(bars, [label(value) for value in values], padding=4)
    axes.set_xlabel(title)
    axes.margins(x=0.15)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def _loss_lines(results: Sequence[CaseResult]) -> "Figure":
    from matplotlib.figure import Figure

    sweeps = _sweeps(results)
    figure = Figure(figsize=(11, 0.8 + 3.8 * len(sweeps)), layout="constrained")
    figure.suptitle("Divergence and gradients")
    panels = figure.subplots(len(sweeps), 2, squeeze=False)
    for (time_axes, memory_axes), (axis, sweep) in zip(panels, sweeps, strict=True):
        time_axes.set_title(_described(sweep[0].case, without=axis), loc="left", fontsize=10)
        _lines(time_axes, axis, sweep, lambda row: row.median(), "median seconds")
        _lines(memory_axes, axis, sweep, _extra_mib, "peak extra MiB")
    # A contender that ran out of memory in one panel may still be in another
    lines = {line.get_label(): line for axes in panels[:, 0] for line in axes.lines}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines) or 1, frameon=False)
    return figure


def _sweeps(results: Sequence[CaseResult]) -> list[tuple[str, list[CaseResult]]]:
    """Cases that differ in one size alone, with its name, in the order of that size: those that make up all cases."""
    values = {size: {result.case[size] for result in results} for size in _SIZES}
    sweeps = []
    covered: set[int] = set()
    # The size with most values first: of all combinations, it covers every case
    for axis in sorted(_SIZES, key=lambda size: -len(values[size])):
        groups: dict[tuple[int, ...], list[CaseResult]] = {}
        for result in sorted(results, key=lambda result: result.case[axis]):
            groups.setdefault(tuple(result.case[size] for size in _SIZES if size != axis), []).append(result)
        for group in groups.values():
            if len(group) > 1 and not covered.issuperset(map(id, group)):
                covered.update(map(id, group))
                sweeps.append((axis, group))
    return sweeps


def _extra_mib(row: Row) -> float | None:
    extra = row.facts.get("peak_extra_bytes")
    return None if extra is None else extra / 2**20


def _lines(
    axes: "Axes", axis: str, group: Sequence[CaseResult], value: Callable[[Row], float | None], label: str
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    for index, row in enumerate(group[0].rows):
        points = [(result.case[axis], value(result.rows[index])) for result in group]
        # A log axis has no place for nothing at all
        points = [(x, y) for x, y in points if y]
        style = ":" if row.contender == "floor" else "-"
        if points:
            axes.plot(*zip(*points, strict=True), f"o{style}", color=_COLORS[row.contender], label=row.contender)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [result.case[axis] for result in group]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.minorticks_off()
    axes.set_xlabel(_AXIS_LABELS[axis])
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


# Step


def step_table(result: CaseResult) -> Table:
    """
    Makes the table of the step benchmark.

    Args:
        result ([`CaseResult`]):
            What was measured.

    Returns:
        [`~rich.table.Table`]:
            The table.
    """
    case = result.case
    sampled = [("step s", "seconds"), ("generation s", "generation_seconds")] if case["sample"] else []
    columns = ["contender", *(name for name, _ in sampled), "learning s", "min … max", "× ours"]
    columns += [f"{part} s" for part in _PARTS]
    columns += ["first s", "weights MiB", "peak MiB", "in all MiB"]
    table = _table(_step_title(case), _step_caption(result), columns, result)
    own = next((row.median("learning_seconds") for row in result.rows if row.contender == "self-distillation"), None)
    for row in result.rows:
        learning = row.median("learning_seconds")
        cells = [
            row.contender,
            *(_seconds(row.median(key)) for _, key in sampled),
            _seconds(learning),
            _range(row, "learning_seconds"),
            _ratio(learning, own),
            *(_seconds(row.median(f"{part}_seconds")) for part in _PARTS),
            _seconds(row.facts.get("first_seconds")),
            _mib(row.facts.get("model_bytes")),
            _mib(row.facts.get("peak_learning_bytes")),
            _mib(row.facts.get("peak_bytes")),
        ]
        table.add_row(*cells, *([row.error] if row.error else []))
    return table


def _step_title(case: dict[str, Any]) -> str:
    rollouts = f"{case['num_rollouts']} {'sampled' if case['sample'] else 'given'} rollouts"
    if case["num_generations"] > 1:
        rollouts += f" ({case['num_generations']} of each prompt)"
    return (
        f"{Path(case['model']).name}, {'LoRA' if case['lora'] else 'all weights'}, {case['divergence']}, "
        f"{rollouts} of {case['max_new_tokens']} tokens, prompts of {case['prompt_tokens']}, "
        f"teacher prompts of {case['teacher_prompt_tokens']}, {case['dtype']} on {case['device']}"
    )


def _step_caption(result: CaseResult) -> str:
    caption = (
        "Medians of an optimizer step. Learning is the step without the sampling: preparation of the batch, forward "
        "passes and loss, backward pass, optimizer. First is the first step of all. Weights are the parameters and "
        "buffers of all models in the process, peak what learning takes beyond what was in use before the step, in "
        "all both together. "
    )
    if any(row.contender == "distillation" for row in result.rows):
        reads = "what the others read" if result.case["equal_teacher_tokens"] else "the student's prompt"
        caption += f"The teacher of `distillation`, a second model, reads {reads}. "
    alone = [row.contender for row in result.rows if row.alone]
    if not alone:
        return caption + "The contenders took turns."
    if len(alone) == len(result.rows):
        return caption + "The contenders ran one after the other."
    return caption + f"The contenders took turns, but for {', '.join(alone)}: beside the others, memory was short."


def step_plot(results: Sequence[CaseResult]) -> "Figure":
    """
    Draws what a step takes.

    Args:
        results (`Sequence[CaseResult]`):
            The one case.

    Returns:
        [`~matplotlib.figure.Figure`]:
            The figure: time on the left, memory on the right.
    """
    from matplotlib.figure import Figure

    [result] = results
    rows = [row for row in result.rows if row.median() is not None]
    figure = Figure(figsize=(12, 2.2 + 0.55 * len(rows)), layout="constrained")
    figure.suptitle(_step_title(result.case), fontsize=11)
    time_axes, memory_axes = figure.subplots(1, 2, sharey=True)
    names = [row.contender for row in rows]
    colors = {"generation": _GENERATION} if result.case["sample"] else {}
    colors |= _PARTS
    seconds = {part: [row.median(f"{part}_seconds") or 0.0 for row in rows] for part in colors}
    _stacked(time_axes, names, seconds, colors, _seconds)
    time_axes.set_xlabel("median seconds")
    mib = {
        label: [row.facts.get(key, 0) / 2**20 for row in rows]
        for label, key in (("weights", "model_bytes"), ("peak while learning", "peak_learning_bytes"))
    }
    colors = {"weights": _WEIGHTS, "peak while learning": _PEAK}
    _stacked(memory_axes, names, mib, colors, lambda value: f"{value:,.0f}")
    memory_axes.set_xlabel("MiB")
    time_axes.invert_yaxis()
    return figure


def _stacked(
    axes: "Axes",
    names: Sequence[str],
    values: dict[str, list[float]],
    colors: dict[str, str],
    label: Callable[[float], str],
) -> None:
    left = [0.0] * len(names)
    longest = max((sum(row) for row in zip(*values.values(), strict=True)), default=0.0)
    for name, lengths in values.items():
        bars = axes.barh(names, lengths, left=left, color=colors[name], height=0.6, label=name)
        texts = [label(length) if length > 0.08 * longest else "" for length in lengths]
        axes.bar_label(bars, texts, label_type="center", fontsize=9)
        left = [start + length for start, length in zip(left, lengths, strict=True)]
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(values), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


# Teacher


def teacher_table(result: CaseResult) -> Table:
    """
    Makes the table of the teacher benchmark.

    Args:
        result ([`CaseResult`]):
            What was measured.

    Returns:
        [`~rich.table.Table`]:
            The table.
    """
    columns = ["contender", "median s", "min … max", "× whole", "peak extra MiB"]
    table = _table(_teacher_title(result.case), "The backbone's pass over all rollouts.", columns, result)
    whole = result.median_of("whole-sequences")
    for row in result.rows:
        cells = [row.contender, _seconds(row.median()), _range(row), _ratio(row.median(), whole)]
        cells.append(_mib(row.facts.get("peak_extra_bytes")))
        table.add_row(*cells, *([row.error] if row.error else []))
    return table


def teacher_plot(results: Sequence[CaseResult]) -> "Figure":
    """
    Draws what the teacher's pass takes.

    Args:
        results (`Sequence[CaseResult]`):
            The one case.

    Returns:
        [`~matplotlib.figure.Figure`]:
            The figure: time on the left, memory on the right.
    """
    [result] = results
    return _bars_of(result, f"Teacher's pass: {_teacher_title(result.case)}")


def _teacher_title(case: dict[str, Any]) -> str:
    return (
        f"{Path(case['model']).name}, {case['num_rollouts']} rollouts of {case['max_new_tokens']} tokens after one "
        f"prompt of {case['teacher_prompt_tokens']}, {case['dtype']} on {case['device']}"
    )


REPORTS = {
    "loss": Report(loss_table, loss_plot),
    "step": Report(step_table, step_plot),
    "teacher": Report(teacher_table, teacher_plot),
}
