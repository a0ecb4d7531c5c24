"""The page of the runs on a real model and its plots, from whatever results there are."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from ..experiment.figures import Result
from ..experiment.plots import draw_curves
from ..experiment.runner import Plan, Results, missing, planned_seconds
from ..playground.facts import CHAINS, FACTS_PER_SIZE
from .arms import ARMS, FULL, PAGED, PARTS, TUNING_SEED, RealPlan
from .questions import questions
from .retention import FAMILIES as KEPT
from .retention import INSTRUCTIONS, PROBLEMS, QUESTIONS
from .tables import (
    AGAINST,
    FAMILY_COLUMNS,
    WORDING_COLUMNS,
    Runs,
    against_sft,
    columns,
    family_rows,
    reading,
    row,
    said,
    wording_rows,
)
from .work import PROBED


if TYPE_CHECKING:
    from matplotlib.figure import Figure


_PAGE = """\
{% macro table(columns, rows) %}
{% if rows %}
| {{ columns | join(" | ") }} |
|{{ "---|" * columns | length }}
{% for row in rows %}
| {{ row | join(" | ") }} |
{% endfor %}
{% else %}
Nothing yet.
{% endif %}
{% endmacro %}
{% macro outcome(part) %}
{{ table(part.columns, part.rows) }}
{{ part.rate }}

{% for title, image in part.plots %}
![{{ title }}]({{ image }})

{% endfor %}
{{ part.reading or "Nothing yet." }}

{% if part.against %}
Less SFT, seed by seed, with the 95 % interval; what it holds zero in is not told apart.

{{ table(against_columns, part.against) }}
{% endif %}
{% if part.said %}
With seed {{ part.shown }}, the first answers, whatever they look like:

{{ table(part.said_columns, part.said) }}
{% endif %}
{% endmacro %}
# A real pretrained model

{% if missing %}
> {{ missing }}

{% endif %}
{% if is_quick %}
> These are the quick runs: one seed, {{ "%.0f" | format(100 * scale) }} % of the steps, a few of the arms, and one
> learning rate for all of them, which nothing was tuned to. For results, run `make real`.

{% endif %}
Does a pretrained model get better by its own reading, and what does it forget? Everything below is computed from the
files in `{{ folder }}` by `{{ command }}`, which goes on where it was stopped; no sentence about an
outcome is written by hand. The model is `{{ model }}`, on {{ device }}. No paper's result is reproduced here.

All arms train an adapter of the same shape. Tables have the mean ± half of a 95 % interval, Student's t over the
seeds. Seconds are {{ clock }}, of training and of making its data, without tests. Answers that are tested are the
likeliest ones, graded by [the one scorer](scoring.md). What is kept is measured on {{ questions }} questions of
general knowledge, on {{ problems }} sums and products of single digits by reasoning-gym, and on the base's own answers
to the questions and to {{ instructions }} instructions: KL(p_base ‖ p_model) per token, in nats.

## Facts it does not know

Each seed has a world of its own: {{ facts }} facts about people, towns and devices that do not exist. A fact is asked
about in four wordings that are trained on and in two others, kept for the test; {{ two }} questions take two facts and
are never trained on. An answer is right if it names what is asked for, in one of its words, and no answer to the same
question about another thing: that can be said of a sentence that is otherwise nonsense. The teacher, the ceiling and
those who write samples for SFT read

```
{{ parts.facts.template }}
```

where `about` is what the fact sheet says of the thing that is asked about.

{{ outcome(parts.facts) }}
{% if tokens %}
[What student and teacher say of one answer, token by token]({{ tokens }}), before the training and after it, by
{{ paged }}.

{% endif %}
## Brevity

Of {{ pool }} easy questions, those that the model answers by itself are asked; each seed draws anew which three
fifths are trained on, and the others are the test. An answer is right if it names what is asked for. Nothing but the
length is to change. The teacher reads

```
{{ parts.brevity.template }}
```

the wording that was chosen among these, asked of some of the questions (intervals over the questions):

{{ table(wording_columns, wordings) }}
{{ outcome(parts.brevity) }}
## A skill

Easy levels of reasoning-gym, {{ probed }} problems each: what the model solves by itself, and while it reads

```
{{ parts.skill.template }}
```

{{ table(family_columns, families) }}
Where that leaves room, there is something that the teacher knows and the student does not; whether it can be taught is
another question. Trained and tested is `{{ family }}`, on problems of each seed's own, none of the test among those of
the training. A teacher that reads the answer of another problem is the control.

{{ outcome(parts.skill) }}
## What it cost

{{ finished }} of {{ total }} reported runs are there. All runs that were made took {{ core_hours }} core-hours; the
whole plan takes {{ planned }} core-hours on a CPU, by estimate from measured steps. Each run is a file
`runs/NAME.json` in `{{ folder }}`, with its settings, seed, versions and first answers; `{{ command }}` makes those
that are missing, with `--only ARM` those of some arms.

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
    Writes the page and its plots.

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
    finished, total = results.num_reported(plan)
    left = results.all(plan)
    is_quick = plan.scale != FULL.scale
    options = [] if (plan.model, plan.device) == (FULL.model, FULL.device) else [f"--model {plan.model}"]
    options += ["--quick"] if is_quick else []
    options += [f"--device {plan.device}"] if plan.device != FULL.device else []
    once = {base: results.complete(plan.base_run(base)) or {} for base in PARTS}
    size, tokens = PARTS["facts"].settings["size"], results.folder / "tokens.html"
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    text = environment.from_string(_PAGE).render(
        missing=missing(finished, total),
        is_quick=is_quick,
        scale=plan.scale,
        folder=results.folder,
        command="make real" + (f' ARGS="{" ".join(options)}"' if options else ""),
        model=plan.model,
        device=plan.device,
        clock="processor time" if plan.device == "cpu" else "by the clock",
        questions=len(QUESTIONS),
        problems=PROBLEMS * len(KEPT),
        instructions=len(INSTRUCTIONS),
        facts=FACTS_PER_SIZE * size,
        two=len(CHAINS) * size,
        tokens=os.path.relpath(tokens, page.parent) if tokens.is_file() else None,
        paged=ARMS[PAGED[0]].title,
        pool=len(questions()),
        probed=PROBED,
        family=PARTS["skill"].settings["family"],
        parts={base: _part(plan, results, base, page) for base in PARTS},
        against_columns=AGAINST,
        wording_columns=WORDING_COLUMNS,
        wordings=wording_rows(once["brevity"]),
        family_columns=FAMILY_COLUMNS,
        families=family_rows(once["skill"]),
        finished=finished,
        total=total,
        core_hours=f"{sum(result.get('cpu_seconds', 0.0) for result in left.values()) / 3600:.2f}",
        planned=f"{sum(seconds for _, seconds in planned_seconds(plan).values()) / 3600:.1f}",
        runs={run.name: _figures(result) for run, result in left.items() if "error" not in result},
        failures=dict(sorted((run.name, result["error"]) for run, result in left.items() if "error" in result)),
    )
    page.write_text(text, encoding="utf-8")
    return [f"{finished} of {total} reported runs are there."]


def _part(plan: RealPlan, results: Results, base: str, page: Path) -> dict[str, Any]:
    runs = {arm: results.reported(plan, arm, base) for arm, its in plan.pairs() if its == base}
    shown, said_columns, answers = said(runs)
    return {
        "template": PARTS[base].settings["template"],
        "columns": columns(base),
        "rows": [row(plan, results, base, arm, its) for arm, its in runs.items()],
        "rate": _tuning(plan, base),
        "plots": _write_plot(runs, base, page),
        "reading": reading(runs, base),
        "against": against_sft(runs, base),
        "shown": shown,
        "said_columns": said_columns,
        "said": answers,
    }


def _tuning(plan: RealPlan, base: str) -> str:
    rates = ", ".join(f"{rate:g}" for rate in plan.rates(base))
    if plan.learning_rates:
        return f"The rate, {rates}, was not tuned."
    best = {
        "facts": "for new wordings in the world of",
        "brevity": "for right answers less length as a share of the model's own, with",
        "skill": "for right answers with",
    }
    variants = [
        f"“{ARMS[arm].title}” that of “{ARMS[tuned].title}”"
        for arm, its in plan.pairs()
        if its == base and (tuned := ARMS[arm].tuned_as)
    ]
    text = (
        f"The rate is the best of {rates} {best[base]} seed {TUNING_SEED}, which is not reported; a star marks the "
        "end of the grid."
    )
    return f"{text} Variants take one over: {', '.join(variants)}." if variants else text


def _figures(result: Result) -> str:
    final = result["final"]
    shares = [
        f"{name} {100 * final[name]:.0f} %"
        for name in ("trained", "new", "two", "test", "unrelated", "solved")
        if name in final
    ]
    shares += [f"divergence {final['divergence']:.3f}"] if "divergence" in final else []
    return ", ".join([*shares, f"{result['cpu_seconds']:.0f} core-seconds, {result['peak_memory_gb']:.1f} GB"])


def _write_plot(runs: Mapping[str, Runs], base: str, page: Path) -> list[tuple[str, str]]:
    figure = curves(runs, base)
    if figure is None:
        return []
    images = page.with_suffix("")
    images.mkdir(parents=True, exist_ok=True)
    figure.savefig(images / f"{base}.png", dpi=110)
    return [("Over the training", f"{images.name}/{base}.png")]


# Figures of the curves of each part
_CURVES = {
    "facts": (("trained", "right answers, wordings that are trained on"), ("new", "right answers, new wordings")),
    "brevity": (("test", "right answers"), ("mean_tokens", "tokens per answer")),
    "skill": (("test", "right answers"),),
}


def curves(runs: Mapping[str, Runs], base: str) -> "Figure | None":
    """
    What is asked along the way, over the training.

    Args:
        runs (`Mapping[str, Mapping[int, dict]]`):
            Results by arm and seed.
        base (`str`):
            The part.

    Returns:
        [`~matplotlib.figure.Figure`] or `None`: the plot, `None` without a curve.
    """
    from matplotlib.figure import Figure

    trained = {ARMS[arm].title: its for arm, its in runs.items() if its and ARMS[arm].trainer != "none"}
    if not trained:
        return None
    figure = Figure(figsize=(14, 5), layout="constrained")
    several = figure.subplots(1, len(_CURVES[base]), squeeze=False)[0]
    for axes, (name, title) in zip(several, _CURVES[base], strict=True):
        draw_curves(axes, trained, name, "step")
        axes.set_title(title)
        if name != "mean_tokens":
            axes.set_ylim(-0.03, 1.03)
    several[-1].legend(frameon=False, fontsize=8)
    return figure
