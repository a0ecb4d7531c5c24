"""The page of the runs on a real model and its plot, from whatever results there are."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import jinja2

from ..experiment.figures import Result, interval, with_interval
from ..experiment.plots import draw_curves
from ..experiment.runner import Plan, Results, missing, planned_seconds
from ..playground.facts import CHAINS, FACTS_PER_SIZE
from .arms import ARMS, FULL, PARTS, TEMPLATE, TUNING_SEED, RealPlan
from .retention import INSTRUCTIONS, QUESTIONS


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Results of an arm by seed
Runs = Mapping[int, Result]

# Of the ceiling
GOAL = 2 / 3
COLUMNS = (
    "arm",
    "seeds",
    "rate",
    "trained wordings, %",
    "new wordings, %",
    "two facts, %",
    "unrelated questions, %",
    "divergence from the base",
    "tokens per answer",
    "generated tokens",
    "seconds",
    "GB at most",
)

AGAINST = (
    "arm",
    "of the ceiling, new wordings",
    "seeds with two thirds of it",
    "new wordings, points",
    "two facts, points",
    "divergence from the base, nats",
    "unrelated questions, points",
)

_PAGE = """\
# A real pretrained model

{% if missing %}
> {{ missing }}

{% endif %}
{% if is_quick %}
> These are the quick runs: one seed, {{ "%.0f" | format(100 * scale) }} % of the steps, a few of the arms, and one
> learning rate for all of them, which nothing was tuned to. For results, run `make real`.

{% endif %}
Does on-policy self-distillation learn facts as well as SFT, and forget less? Everything below is computed from the
files in `{{ folder }}` by `{{ command }}`, which goes on where it was stopped; no sentence about an
outcome is written by hand. The model is `{{ model }}`, on {{ device }}. No paper's result is reproduced here.

## The work

Each seed has a world of its own: {{ facts }} facts about people, towns and devices that do not exist. A fact is asked
about in four wordings that are trained on and in two others, kept for the test; {{ two }} questions take two facts and
are never trained on. An answer is right if it names what is asked for, in one of its words, and no answer to the same
question about another thing ([scoring](scoring.md)): that can be said of a sentence that is otherwise nonsense.
Answers are the likeliest ones. The teacher, the ceiling and those who write samples for SFT read

```
{{ template }}
```

where `about` is what the fact sheet says of the thing that is asked about. Retention is measured on {{ questions }}
questions of general knowledge, and on the base's own answers to these and to {{ instructions }} instructions:
KL(p_base ‖ p_model) per token, in nats.

## The table

| {{ columns | join(" | ") }} |
|{{ "---|" * columns | length }}
{% for row in rows %}
| {{ row | join(" | ") }} |
{% endfor %}

Mean ± half of a 95 % interval, Student's t over the seeds. Seconds are {{ clock }}, of training and of making its
data, without tests. {{ rate }}


{% for title, image in plots %}
![{{ title }}]({{ image }})

{% endfor %}
## What the figures support

{{ reading or "Nothing yet." }}

{% if against %}
Less SFT on the answers, seed by seed, with the 95 % interval; what it holds zero in is not told apart.

| {{ against_columns | join(" | ") }} |
|{{ "---|" * against_columns | length }}
{% for row in against %}
| {{ row | join(" | ") }} |
{% endfor %}

{% endif %}
## What it says

{% if said %}
World of seed {{ shown }}, the first questions in new wordings, whatever the answers look like.

| {{ said_columns | join(" | ") }} |
|{{ "---|" * said_columns | length }}
{% for row in said %}
| {{ row | join(" | ") }} |
{% endfor %}
{% else %}
Nothing yet.
{% endif %}

## What it cost

{{ finished }} of {{ total }} reported runs are there. All runs that were made took {{ core_hours }} core-hours; the
whole plan takes {{ planned }} core-hours on a CPU by the measured cost of a step of self-distillation, and estimates
of SFT's and of the tests. Each run is a file `runs/NAME.json` in `{{ folder }}`, with its settings, seed, versions and
answers; `{{ command }}` makes those that are missing, with `--only ARM` those of some arms.

{% for name, figures in runs.items() %}
- `{{ name }}`: {{ figures }}
{% endfor %}
{% if failures %}

Runs that failed:

{% for name, error in failures.items() %}
- `{{ name }}`: {{ error }}
{% endfor %}
{% endif %}
"""


def write_report(results: Results, plan: Plan, page: Path) -> list[str]:
    """
    Writes the page and its plot.

    Args:
        results ([`~trl_opsd.experiment.runner.Results`]):
            What there is.
        plan ([`RealPlan`]):
            What there is to be.
        page (`Path`):
            The page.

    Returns:
        `list[str]`: lines for the console.
    """
    assert isinstance(plan, RealPlan)
    runs = {arm: results.reported(plan, arm, base) for arm, base in plan.pairs()}
    finished, total = results.num_reported(plan)
    left = results.all(plan)
    is_quick = plan.scale != FULL.scale
    options = [] if (plan.model, plan.device) == (FULL.model, FULL.device) else [f"--model {plan.model}"]
    options += ["--quick"] if is_quick else []
    options += [f"--device {plan.device}"] if plan.device != FULL.device else []
    shown, said_columns, said = _said(runs)
    size = PARTS["facts"].size
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    text = environment.from_string(_PAGE).render(
        missing=missing(finished, total),
        is_quick=is_quick,
        scale=plan.scale,
        folder=results.folder,
        command="make real" + (f' ARGS="{" ".join(options)}"' if options else ""),
        model=plan.model,
        device=plan.device,
        facts=FACTS_PER_SIZE * size,
        two=len(CHAINS) * size,
        template=TEMPLATE,
        questions=len(QUESTIONS),
        instructions=len(INSTRUCTIONS),
        columns=COLUMNS,
        rows=[_row(plan, results, arm, its) for arm, its in runs.items()],
        clock="processor time" if plan.device == "cpu" else "by the clock",
        rate=_tuning(plan),
        plots=_write_plot(runs, page),
        reading=reading(runs),
        against_columns=AGAINST,
        against=against_sft(runs),
        shown=shown,
        said_columns=said_columns,
        said=said,
        finished=finished,
        total=total,
        core_hours=f"{sum(result.get('cpu_seconds', 0.0) for result in left.values()) / 3600:.2f}",
        planned=f"{sum(seconds for _, seconds in planned_seconds(plan).values()) / 3600:.1f}",
        runs={run.name: _figures(result) for run, result in left.items() if "error" not in result},
        failures=dict(sorted((run.name, result["error"]) for run, result in left.items() if "error" in result)),
    )
    page.write_text(text, encoding="utf-8")
    return [f"{finished} of {total} reported runs are there."]


def _tuning(plan: Plan) -> str:
    rates = ", ".join(f"{rate:g}" for rate in plan.learning_rates)
    if len(plan.learning_rates) == 1:
        return f"The rate, {rates}, was not tuned."
    return (
        f"The rate is the best of {rates} for new wordings in the world of seed {TUNING_SEED}, which is not reported; "
        "a star marks the end of the grid."
    )


def _row(plan: Plan, results: Results, arm: str, runs: Runs) -> list[str]:
    finals = [result["final"] for result in runs.values()]
    rate = results.learning_rate(plan, arm, "facts") if results.is_tuned(plan, arm, "facts") else None
    at_end = len(plan.learning_rates) > 1 and rate in (min(plan.learning_rates), max(plan.learning_rates))
    return [
        ARMS[arm].title,
        f"{len(runs)} of {len(plan.seeds)}",
        "–" if rate is None else f"{rate:g}{'*' if at_end else ''}",
        *(with_interval([its[name] for its in finals], scale=100) for name in ("trained", "new", "two", "unrelated")),
        with_interval([its["divergence"] for its in finals], form="{:.3f}"),
        with_interval([its["mean_tokens"] for its in finals]),
        with_interval([result["generated_tokens"] for result in runs.values()], form="{:,.0f}"),
        with_interval([result["seconds"] for result in runs.values()], form="{:,.0f}"),
        with_interval([result["peak_memory_gb"] for result in runs.values()]),
    ]


def _figures(result: Result) -> str:
    final = result["final"]
    shares = [f"{name} {100 * final[name]:.0f} %" for name in ("trained", "new", "two", "unrelated") if name in final]
    shares += [f"divergence {final['divergence']:.3f}"] if "divergence" in final else []
    return ", ".join([*shares, f"{result['cpu_seconds']:.0f} core-seconds, {result['peak_memory_gb']:.1f} GB"])


def reading(runs: Mapping[str, Runs]) -> str:
    """What the model answers by itself and while it reads, nothing if either is not known."""
    floor, told = runs.get("floor", {}), runs.get("told", {})
    if not floor or not told:
        return ""
    low, high = (100 * fmean(result["final"]["new"] for result in its.values()) for its in (floor, told))
    return (
        f"The model itself answers {low:.1f} % of the questions in new wordings, and {high:.1f} % while it reads the "
        "facts: the ceiling."
    )


def against_sft(runs: Mapping[str, Runs]) -> list[list[str]]:
    """
    What each arm keeps of the ceiling, and how it differs from SFT on the answers.

    Args:
        runs (`Mapping[str, Mapping[int, dict]]`):
            Results by arm and seed.

    Returns:
        `list[list[str]]`: cells under [`AGAINST`], of the arms that have results.
    """
    told, sft, rows = runs.get("told", {}), runs.get("sft", {}), []
    for arm, its in runs.items():
        kept = [_ratio(its[seed], told[seed]) for seed in sorted(its.keys() & told.keys())]
        if ARMS[arm].trainer == "none" or not kept:
            continue
        differences = [
            "–" if arm == "sft" else _difference(its, sft, name, scale)
            for name, scale in (("new", 100), ("two", 100), ("divergence", 1), ("unrelated", 100))
        ]
        reached = f"{sum(share >= GOAL for share in kept)} of {len(kept)}"
        rows.append([ARMS[arm].title, f"{100 * fmean(kept):.0f} %", reached, *differences])
    return rows


def _ratio(result: Result, told: Result) -> float:
    return result["final"]["new"] / told["final"]["new"] if told["final"]["new"] else 0.0


def _difference(ones: Runs, others: Runs, name: str, scale: int) -> str:
    values = [
        scale * (ones[seed]["final"][name] - others[seed]["final"][name]) for seed in ones.keys() & others.keys()
    ]
    if len(values) < 2:
        return "–"
    mean, low, _ = interval(values)
    form = "{:+.1f} ± {:.1f}" if scale == 100 else "{:+.3f} ± {:.3f}"
    outcome = "" if abs(mean) <= mean - low else ", above" if mean > 0 else ", below"
    return f"{form.format(mean, mean - low)}{outcome}"


def _said(runs: Mapping[str, Runs], number: int = 6) -> tuple[int | None, list[str], list[list[str]]]:
    """The first answers of all arms in the first world that two of them have."""
    seeds = sorted({seed for its in runs.values() for seed in its})
    for seed in seeds:
        its = {arm: done[seed]["answers"] for arm, done in runs.items() if seed in done}
        if len(its) > 1:
            first = next(iter(its.values()))
            columns = ["question", "right answer", *(ARMS[arm].title for arm in its)]
            rows = [
                [
                    first[index]["question"],
                    first[index]["answer"],
                    *(f"{'✓' if its[arm][index]['right'] else '✗'} {_cell(its[arm][index])}" for arm in its),
                ]
                for index in range(min(number, len(first)))
            ]
            return seed, columns, rows
    return None, [], []


def _cell(answer: Mapping[str, Any]) -> str:
    """What was said, as text in a table."""
    text = " ".join(answer["said"].split())
    for character in "\\`*_[]<>|$":
        text = text.replace(character, f"\\{character}")
    return text + (" …" if answer["cut"] else "")


def _write_plot(runs: Mapping[str, Runs], page: Path) -> list[tuple[str, str]]:
    figure = curves(runs)
    if figure is None:
        return []
    images = page.with_suffix("")
    images.mkdir(parents=True, exist_ok=True)
    figure.savefig(images / "recall.png", dpi=110)
    return [("Right answers over the training", f"{images.name}/recall.png")]


def curves(runs: Mapping[str, Runs]) -> "Figure | None":
    """
    Right answers over the training, in trained and in new wordings, of those that are asked along the way.

    Args:
        runs (`Mapping[str, Mapping[int, dict]]`):
            Results by arm and seed.

    Returns:
        [`~matplotlib.figure.Figure`] or `None`: the plot, `None` without a curve.
    """
    from matplotlib.figure import Figure

    trained = {ARMS[arm].title: its for arm, its in runs.items() if its and ARMS[arm].trainer != "none"}
    if not trained:
        return None
    figure = Figure(figsize=(14, 5), layout="constrained")
    for axes, (name, title) in zip(
        figure.subplots(1, 2, sharey=True),
        (("trained", "wordings that are trained on"), ("new", "new wordings")),
        strict=True,
    ):
        draw_curves(axes, trained, name, "step")
        axes.set_title(f"Right answers, {title}")
        axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, fontsize=8)
    return figure
