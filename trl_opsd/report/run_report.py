"""The report of training runs: one page with what they were, how they went, what came of it and what it cost."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from markupsafe import Markup

from ..eval.compare import Comparison
from ..eval.statistics import Estimate, student_t
from .answers import Answers, answers, choose, sampled
from .curves import RUN_COLORS, Panel, benchmark_panels, draw, main_panels, missing_metrics, other_panels
from .evaluated import Evaluation, afterwards, difference, in_training
from .evaluation import number, percent, points
from .page import figure, page, table
from .runs import Run


STYLE = """\
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 0 1.5rem; }
.grid figure { margin: .6rem 0; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 1rem; }
.columns > div { min-width: 0; }
main pre { max-height: 24rem; overflow-y: auto; margin: .2rem 0 .8rem; }
.text td, .text th { text-align: left; overflow-wrap: anywhere; }
details { margin: 1rem 0; }
summary { cursor: pointer; }
"""
# Characters of a text that are shown from its beginning and from its end
_SHOWN = 1500


def report_page(
    runs: Sequence[Run],
    target: Path,
    evaluations: Sequence[Path] = (),
    title: str | None = None,
    lead: Sequence[Markup] = (),
    examples: Sequence[Answers] | None = None,
) -> str:
    """
    Makes the report of a run, or of several beside one another.

    Args:
        runs (`Sequence[Run]`):
            The runs, at least one.
        target (`Path`):
            File that the page is for: links in it start from there.
        evaluations (`Sequence[Path]`, *optional*, defaults to `()`):
            Folders of `trl-opsd eval`, beside those in the folders of the runs.
        title (`str`, *optional*):
            Title. `None` names the runs.
        lead (`Sequence[Markup]`, *optional*, defaults to `()`):
            What comes first.
        examples (`Sequence[Answers]`, *optional*):
            Answers to show before and after. `None` takes them from evaluations while training, or from logged
            completions.

    Returns:
        `str`:
            The page.

    Raises:
        ValueError: If an evaluation or logged completions cannot be read.
    """
    if title is None:
        names = ", ".join(run.name for run in runs)
        title = f"{runs[0].method['name']}: {names}" if len(runs) == 1 and runs[0].method else names
    later = [afterwards(folder, f"{run.name}, {folder.name}") for run in runs for folder in run.later_evaluations]
    later += [afterwards(folder, folder.resolve().name) for folder in evaluations]
    body = [
        *lead,
        _state(runs),
        *_settings(runs),
        *_curves(runs),
        *_evaluations(runs, [evaluation for its in later for evaluation in its]),
        *_rollouts(runs, target, examples),
        *_cost(runs),
    ]
    return page(title, body, style=STYLE)


def heading(text: str) -> Markup:
    """A heading of a section."""
    return Markup("<h2>{}</h2>").format(text)


def paragraph(text: str) -> Markup:
    """A paragraph."""
    return Markup("<p>{}</p>").format(text)


def folded(title: str, parts: Iterable[Markup]) -> Markup:
    """Parts that are shown when asked for."""
    return Markup("<details><summary>{}</summary>\n{}\n</details>").format(title, Markup("\n").join(parts))


# What it is


def _state(runs: Sequence[Run]) -> Markup:
    lines = [
        f"{run.name + ': ' if len(runs) > 1 else ''}{' '.join([_progress(run), *_came_of_it(run)])}" for run in runs
    ]
    lines += [f"{run.name}: {said}" for run in runs for session in run.sessions for said in session.guards]
    lines += [
        f"{run.name}: not in the log: {', '.join(missing)}. It was written by another trainer, or by another version "
        "of this one or of TRL."
        for run in runs
        if (missing := missing_metrics(run))
    ]
    return Markup("\n").join(map(paragraph, lines))


def _progress(run: Run) -> str:
    if not run.log:
        return "nothing has been logged yet."
    steps = f"{run.step:,} of {run.max_steps:,} steps" if run.max_steps else f"{run.step:,} steps"
    resumed = [f"{session.step:,}" for session in run.sessions if session.step]
    text = f"{steps}, resumed at step {', '.join(resumed)}" if resumed else steps
    if run.is_finished:
        return f"{text}."
    assert run.written is not None
    return f"{text}: not finished, last heard of at {run.written:%Y-%m-%d %H:%M:%S}."


def _came_of_it(run: Run) -> list[str]:
    pairs = {name: ends for name, ends in in_training(run).items() if len(ends) == 2}
    return [
        f"{name}: {percent(base.accuracy)} right at {base.name}, {percent(last.accuracy)} at {last.name}."
        for name, (base, last) in pairs.items()
    ]


def _settings(runs: Sequence[Run]) -> list[Markup]:
    parts = [heading("Settings")]
    cited = {run.method["paper"]: run.method for run in runs if run.method}
    for paper, method in cited.items():
        of_it = [run.name for run in runs if run.method and run.method["paper"] == paper]
        by = f"{', '.join(of_it)}: " if len(runs) > 1 else ""
        text = '<p>{}{}, <cite>{}</cite>, <a href="https://huggingface.co/papers/{}">{}</a>.</p>'
        parts.append(Markup(text).format(by, method["name"], method["title"], paper, paper))
        parts.append(folded("BibTeX", [Markup("<pre>{}</pre>").format(method["citation"])]))
    silent = [run.name for run in runs if not run.sessions]
    if silent:
        parts.append(paragraph(f"The settings of {', '.join(silent)} are not known: the run left no record of them."))
    known = [run for run in runs if run.sessions]
    if known:
        parts += _own_settings(known[0]) if len(runs) == 1 else _compared_settings(known)
    return parts


def _own_settings(run: Run) -> list[Markup]:
    parts = [_of_text(["who trains whom", ""], run.summary)] if run.summary else []
    session = run.sessions[-1]
    rows = [
        [name, _shown(session.settings[name]), _shown(value)]
        for name, value in session.defaults.items()
        if value not in ("", None) or session.settings[name] not in ([], {})
    ]
    if rows:
        parts.append(_of_text(["setting", "value", f"default of {run.config}"], rows))
    else:
        parts.append(paragraph(f"Every setting has the default of {run.config}."))
    for before, after in zip(run.sessions, run.sessions[1:], strict=False):
        changed = [
            f"{name} from {_shown(before.settings.get(name))} to {_shown(value)}"
            for name, value in after.settings.items()
            if before.settings.get(name) != value and name != "resume_from_checkpoint"
        ]
        if changed:
            parts.append(paragraph(f"Changed when it was resumed at step {after.step:,}: {', '.join(changed)}."))
    every = [[name, _shown(value)] for name, value in sorted(session.settings.items())]
    versions = [[name, version or "not installed"] for name, version in session.versions.items()]
    begun = [["begun" if not one.step else f"resumed at {one.step:,}", one.time] for one in run.sessions]
    parts.append(folded("All settings", [_of_text(["setting", "value"], every)]))
    parts.append(
        folded("Versions and devices", [_of_text(["", ""], [*versions, ["devices", session.devices], *begun])])
    )
    return parts


def _of_text(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> Markup:
    return Markup('<div class="text">{}</div>').format(table(header, rows, caption))


def _compared_settings(runs: Sequence[Run]) -> list[Markup]:
    header = ["", *(run.name for run in runs)]
    settings = [run.sessions[-1].settings for run in runs]
    rows = _differing([dict(run.summary) for run in runs]), _differing(settings, ("output_dir", "run_name"))
    versions = _differing([run.sessions[-1].versions | {"devices": run.sessions[-1].devices} for run in runs])
    parts = []
    for title, found in (("Who trains whom", rows[0]), ("Settings", rows[1]), ("Versions and devices", versions)):
        if found:
            parts.append(_of_text(header, found, caption=f"{title}: what differs"))
        else:
            parts.append(paragraph(f"{title}: no difference."))
    return parts


def _differing(values: Sequence[dict[str, Any]], but: Sequence[str] = ()) -> list[list[str]]:
    names = [name for name in dict.fromkeys(name for its in values for name in its) if name not in but]
    return [
        [name, *(_shown(its.get(name)) if name in its else "–" for its in values)]
        for name in names
        if any(its.get(name) != values[0].get(name) for its in values)
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# How it went


def _curves(runs: Sequence[Run]) -> list[Markup]:
    panels = main_panels(runs)
    if not panels:
        return []
    others = other_panels(runs)
    parts = [heading("Curves"), _ends(panels, runs), *_key(runs), _grid(panels, runs)]
    if others:
        parts.append(folded(f"Everything else that was logged ({len(others)})", [_grid(others, runs)]))
    return parts


def _key(runs: Sequence[Run]) -> list[Markup]:
    """Which run has which colour."""
    names = [
        Markup('<span style="color: {}">━━</span> {}').format(color, run.name)
        for run, color in zip(runs, cycle(RUN_COLORS), strict=False)
    ]
    return [Markup("<p>{}</p>").format(Markup("&emsp;").join(names))] if len(runs) > 1 else []


def _ends(panels: Sequence[Panel], runs: Sequence[Run]) -> Markup:
    """Where the curves begin and where they end: means of the first and of the last tenth of the entries."""
    rows = []
    for panel in panels:
        unit, scale = (f" ({panel.unit})" if panel.unit else ""), 100 if panel.unit == "%" else 1
        for name, label in panel.curves.items():
            series = [[scale * value for value in run.series(name)[1]] for run in runs]
            rows.append(
                [f"{panel.title}, {label}{unit}", *(" → ".join(map(_mean, tenths(its))) or "–" for its in series)]
            )
    header = ["", *(run.name for run in runs)] if len(runs) > 1 else ["", ""]
    caption = (
        "Means of the first and of the last tenth of the entries. In brackets: 95 % interval from how the entries of "
        "that tenth differ."
    )
    return table(header, rows, caption)


def _mean(estimate: Estimate) -> str:
    shown = f"{estimate.value:.3g}"
    return shown if estimate.low is None else f"{shown} [{estimate.low:.3g}, {estimate.high:.3g}]"


def tenths(values: Sequence[float]) -> list[Estimate]:
    """
    Means of the first and of the last tenth of a curve.

    Args:
        values (`Sequence[float]`):
            The curve.

    Returns:
        `list[Estimate]`: both, with their 95 % intervals where a tenth has three values or more; none of no values.
    """
    number_of = max(1, len(values) // 10)
    found = []
    for part in (values[:number_of], values[-number_of:]) if values else ():
        half = student_t(len(part) - 1) * stdev(part) / math.sqrt(len(part)) if len(part) > 2 else None
        mean = fmean(part)
        found.append(Estimate(mean, None if half is None else mean - half, None if half is None else mean + half))
    return found


def _grid(panels: Sequence[Panel], runs: Sequence[Run]) -> Markup:
    figures = []
    for panel in panels:
        names = ", ".join(panel.curves)
        names = "" if names in (panel.title, panel.title.lower()) else names
        said = [panel.title, names and f": {names}", panel.over and f", over {panel.over}"]
        figures.append(figure(draw(panel, runs), "".join(said)))
    return Markup('<div class="grid">\n{}\n</div>').format(Markup("\n").join(figures))


# What came of it


def _evaluations(runs: Sequence[Run], later: Sequence[Evaluation]) -> list[Markup]:
    while_training = [in_training(run) for run in runs]
    benchmarks = dict.fromkeys([name for its in while_training for name in its] + [one.benchmark for one in later])
    if not benchmarks:
        return []
    parts = [heading("Evaluations")]
    if panels := benchmark_panels(runs):
        parts += [*_key(runs), _grid(panels, runs)]
    for benchmark in benchmarks:
        rows = []
        for run, its in zip(runs, while_training, strict=True):
            ends = its.get(benchmark, [])
            prefix = f"{run.name}, " if len(runs) > 1 else ""
            for one in ends:
                change = _change(ends[0], one) if one is not ends[0] else ["", ""]
                rows.append([*_figures(prefix + one.name, one), *change])
        rows += [[*_figures(one.name, one), "", ""] for one in later if one.benchmark == benchmark]
        header = ["", "right", "tokens", "cut off", "change of what is right", "tokens saved"]
        caption = f"{benchmark}. In brackets: 95 % interval over problems like these."
        parts.append(table(header, rows, caption=caption))
        last = [(run, its[benchmark][-1]) for run, its in zip(runs, while_training, strict=True) if benchmark in its]
        if len(last) > 1:
            parts.append(_between(benchmark, last))
    return parts


def _figures(name: str, one: Evaluation) -> list[str]:
    return [
        name,
        f"{percent(one.accuracy)} ({one.metric})",
        number(one.mean_tokens),
        percent(one.truncation_rate),
    ]


def _change(base: Evaluation, new: Evaluation) -> list[str]:
    found = difference(base, new)
    if isinstance(found, str):
        return [found, ""]
    return [points(found.accuracy_difference), percent(found.length_reduction)]


def _between(benchmark: str, ends: Sequence[tuple[Run, Evaluation]]) -> Markup:
    (first, base), *others = ends
    rows = [[run.name, *_change(base, new)] for run, new in others]
    caption = f"{benchmark}, the last evaluation of each, paired by problem: against {first.name}"
    return table(["", "difference of what is right", "tokens saved"], rows, caption=caption)


def _rollouts(runs: Sequence[Run], target: Path, examples: Sequence[Answers] | None) -> list[Markup]:
    links = [link for run in runs for link in _inspected(run, target)]
    chosen = ""
    if examples is None:
        examples, chosen = _examples(runs)
    if not examples and not links:
        return []
    parts = [heading("Rollouts before and after")]
    if links:
        text = "Token by token, as inspected while training: {}."
        parts.append(Markup("<p>{}</p>").format(Markup(text).format(Markup(", ").join(links))))
    if chosen:
        parts.append(paragraph(chosen))
    return [*parts, *map(_answers, examples)]


def _inspected(run: Run, target: Path) -> list[Markup]:
    link = Markup('<a href="{}">{}</a>')
    start = target.resolve().parent
    return [
        link.format(Path(os.path.relpath(file, start)).as_posix(), f"{run.name}, {file.stem}")
        for file in run.inspected
    ]


def _examples(runs: Sequence[Run]) -> tuple[list[Answers], str]:
    """Answers to problems of a benchmark that all runs were evaluated on, or else logged completions."""
    found = [in_training(run) for run in runs]
    for benchmark in found[0]:
        if not all(benchmark in its and len(its[benchmark]) == 2 for its in found):
            continue
        base, last = found[0][benchmark]
        comparison = difference(base, last)
        if isinstance(comparison, Comparison):
            lasts = [its[benchmark][-1] for its in found]
            ends = [(_called(run, one, runs), one) for run, one in zip(runs, lasts, strict=True)]
            kinds = [change.change for change in comparison.changes]
            counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("improved", "worse", "same"))
            chosen = f"{benchmark}: the first problems of each kind ({counts}), and the first completion of each."
            return answers([(_called(runs[0], base, runs), base), *ends], choose(comparison)), chosen
    logged = [answer for run in runs for answer in sampled(run)]
    return logged, "The first completions of the first and of the last logged step." if logged else ""


def _called(run: Run, one: Evaluation, runs: Sequence[Run]) -> str:
    return f"{run.name}, {one.name}" if len(runs) > 1 else one.name


def _answers(shown: Answers) -> Markup:
    column = Markup("<div>{} <small>{}</small><pre>{}</pre></div>")
    columns = [column.format(name, said, _clipped(text)) for name, said, text in shown.written]
    right = Markup(" <small>right: {}</small>").format(shown.answer) if shown.answer else Markup("")
    prompt = Markup("<pre>{}</pre>\n").format(_clipped(shown.prompt)) if shown.prompt else Markup("")
    return Markup('<h3>{}{}</h3>\n{}<div class="columns">\n{}\n</div>').format(
        _clipped(shown.title), right, prompt, Markup("\n").join(columns)
    )


def _clipped(text: str) -> str:
    left_out = len(text) - 2 * _SHOWN
    return text if left_out <= 0 else f"{text[:_SHOWN]}\n[… {left_out:,} characters …]\n{text[-_SHOWN:]}"


# What it cost


def _cost(runs: Sequence[Run]) -> list[Markup]:
    rows: list[list[str]] = []
    for name, values in (
        ("steps", [f"{run.step:,}" for run in runs]),
        ("generated tokens", [_count(run.last("num_generated_tokens")) for run in runs]),
        ("tokens read and generated", [_count(run.last("num_tokens")) for run in runs]),
        ("time in optimizer steps, rollouts included", [_duration(step_seconds(run)) for run in runs]),
        ("of which rollouts were sampled", [_share(_sampling_share(run)) for run in runs]),
        ("time of the last session, evaluations included", [_duration(run.last("train_runtime")) for run in runs]),
        ("peak memory of a process", [_gib(run.last("memory/peak")) for run in runs]),
    ):
        if any(value != "–" for value in values):
            rows.append([name, *values])
    if not any(run.log for run in runs):
        return []
    header = ["", *(run.name for run in runs)] if len(runs) > 1 else ["", ""]
    return [heading("What it cost"), table(header, rows)]


def step_seconds(run: Run) -> float | None:
    """Seconds spent in optimizer steps: each entry has the mean of those since the one before."""
    steps, means = run.series("step_time")
    if not steps:
        return None
    return sum(mean * (step - before) for mean, step, before in zip(means, steps, [0, *steps], strict=False))


def _sampling_share(run: Run) -> float | None:
    sampling, steps = (dict(zip(*run.series(name), strict=True)) for name in ("sampling/step_time", "step_time"))
    known = [step for step in sampling if step in steps]
    return sum(sampling[step] for step in known) / sum(steps[step] for step in known) if known else None


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _gib(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} GiB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
