"""The page of the comparison and its plots, from whatever results there are."""

from functools import cache, partial
from pathlib import Path
from statistics import fmean

import jinja2

from ..experiment.arms import BASES, TUNING_SEED
from ..experiment.figures import Result
from ..experiment.runner import Plan, Results, missing
from .arms import ARMS, BATCH_SIZE, FULL
from .plots import accuracy_over_length, accuracy_over_tokens
from .tables import (
    ACCURACY_GOAL,
    COLLAPSE,
    COLUMNS,
    LENGTH_GOAL,
    Lookup,
    Runs,
    accuracies,
    against_grpo,
    between_arms,
    between_families,
    collapses,
    families,
    rows,
)


_PAGE = """\
# Every method on the same work

{% if missing %}
> {{ missing }}

{% endif %}
{% if is_quick %}
> This is the quick comparison: {{ seeds | length }} seeds, {{ "%.0f" | format(100 * scale) }} % of the tokens, a
> few of the arms, and one learning rate for all of them, which nothing was tuned to. It shows that the machinery
> works, and ranks nothing. For results, run `make methods`.

{% endif %}
Everything below is computed from the files in `{{ folder }}` by `{{ command }}`, which goes on where it was
stopped; no sentence about an outcome is written by hand. Models of 0.8 M parameters add numbers: this shows what
the methods do there, and not how they compare at scale. No paper's result is reproduced here.

## The table

| {{ columns | join(" | ") }} |
|{{ "---|" * columns | length }}
{% for row in rows %}
| {{ row | join(" | ") }} |
{% endfor %}

Mean ± half of a 95 % interval: Student's t over the seeds, for accuracies widened by the error of testing on a few
hundred problems. What a training took, and what it took to the goal, is a mean ± a standard deviation. The goal is
{{ "%.0f" | format(100 * accuracy_goal) }} % of the held-out problems; from the verbose base, answers of
{{ "%.0f" | format(100 * length_goal) }} % of the base's length, with at most {{ "%.0f" | format(100 * collapse) }}
points of its accuracy lost. "Never" is never with any seed; "1 of 3", that the figure is about the one that gets
there. A learning curve has a point every {{ "{:,}".format(every) }} tokens. Collapsed are seeds that end more than
{{ "%.0f" | format(100 * collapse) }} points below the base. A rate with * is at an end of the grid, where a better
one may lie beyond; with † some of its tuning failed. Markers are those of doubt. An arm without results failed or
was not run.

{% for title, file in plots %}
![{{ title }}]({{ file }})

{% endfor %}
## What separates the families

{% for part in parts %}
**{{ part.title | capitalize }}.**

{% if part.controls %}
- Does the reference teach, or just the prompt? {{ part.controls | join("; ") }}.
{% endif %}
{% if part.families %}
- Families of at least two methods, an interval over the methods: {{ part.families | join("; ") }}.
{% endif %}
{% if part.means %}
- Held out, mean of the methods: {{ part.means | join("; ") }}.
{% endif %}
{% if part.grpo %}
- Against GRPO with as many tokens: {{ part.grpo | join("; ") }}.
{% endif %}
- {{ part.collapsed }}

{% endfor %}
## What cannot be seen at this size

- Differences of a few points. With these seeds and problems, the interval of a difference from the first control is
  {{ widths }} wide to each side.
- Anything about text. One token is one character, an answer has 30 to 70 of them, and a solution is right at every
  token, so that methods which filter or weight tokens of a long text have little to choose from.
- What a teacher does that reads worse. The bases were trained to read a reference (reading the solution, the middling
  base is right on {{ told }} of the problems); they cannot write reflections, and read attempts of their own only in
  the words that they were trained on. Recipes in [`recipes/playground`](../recipes/playground) say what is left of
  each method.
- Constants of the papers. Each method runs by its playground recipe. Beside the learning rate, nothing of it was
  tuned.
- Long trainings. What a method does after {{ "{:,.0f}".format(tokens) }} tokens, a constant rate included, was not
  run.

## Set-up

- **Bases.** {{ bases | join(", and ") }}, those of [the study](study.md#set-up): trained once, here at
  {{ knows | join(" and ") }}. Methods that shorten answers start from the verbose base, all others from the
  middling one. GRPO and SFT start from both. Another machine's rounding gives other bases.
- **Arms.** A method is its file in `recipes/playground`, without what is set for all alike below; a method that is
  added joins with its recipe. Controls are OPSD and OPSDC whose teacher reads nothing more than the student, OPSD's
  with another problem's solution, or the lines of its own in another order. *GRPO* is TRL's, with 8 rollouts and a
  reward for right answers. *SFT* learns the solutions, which are as short as answers can be.
- **Matched tokens.** Every arm ends with the step that comes closest to {{ "{:,.0f}".format(tokens) }} generated
  tokens: whatever any model samples, for rollouts, retries, a teacher's samples or a context. SFT ends with as many
  tokens of solutions. Batches are of {{ batch }} sequences. The learning rate rises over the first tenth of the
  tokens and falls to zero by a cosine over the others. A method's own schedules are in steps, as in its recipe.
  Those that are there generated {{ generated }} tokens.
- **Learning rates.** {{ rates | join(", ") }}{% if tuned %}; each arm, controls and GRPO too, is tuned over all of
  them on seed {{ tuning_seed }}, which is not reported, by accuracy on problems that nothing else is tested on
  (from the verbose base, less the length as a share of the base's){% else %} for all{% endif %}.
- **Tests.** One sample per problem at temperature 1 and top-p 0.95: 300 problems held out, 200 longer, 200 in
  words; 200 others for the learning curves (verbose: 150). It is cut off after 72 tokens, from the verbose base
  after 120.
- **Cost.** All methods, tuned over {{ full_rates }} rates and with {{ full_seeds }} seeds, are to take less than 6
  hours on 2 cores; that decided the tokens, the rates and the number of problems. {% if seconds %}A training that is
  there took {{ seconds }} seconds of processor time on one thread, tests and the start of its process not counted.
  {% endif %}All runs that are there took {{ core_hours }} core-hours, tests included.

{% if failures %}
## Runs that failed

{% for name, error in failures.items() %}
- `{{ name }}`: {{ error }}
{% endfor %}
{% endif %}
"""

_CONTROLS = {
    "middling": (("opsd", "opsd_none"), ("opsd", "opsd_other_solution"), ("opsd", "opsd_shuffled_solution")),
    "verbose": (("opsdc", "opsdc_none"),),
}


def write_report(results: Results, plan: Plan, page: Path) -> list[str]:
    """
    Writes the page, and its plots into a folder of the page's name beside it.

    Args:
        results ([`~trl_opsd.experiment.runner.Results`]):
            Results, complete or not.
        plan ([`~trl_opsd.experiment.runner.Plan`]):
            What was to be run.
        page (`Path`):
            The page.

    Returns:
        `list[str]`:
            Lines for the console.
    """
    lookup, pairs = cache(partial(results.of_arm, plan)), plan.pairs()
    finished, total = results.num_reported(plan)
    left = results.all(plan)
    is_quick = plan.scale != FULL.scale
    themselves: dict[str, Result] = {
        base: result for base in plan.bases if (result := results.complete(plan.base_run(base))) is not None
    }
    shown: dict[str, dict[str, Runs]] = {
        base: {arm: lookup(arm, base) for arm, its in pairs if its == base and lookup(arm, base)}
        for base in plan.bases
    }
    generated = [
        result["generated_tokens"]
        for arm, base in pairs
        for result in lookup(arm, base).values()
        if result["generated_tokens"]
    ]
    seconds = [result["seconds"] for arm, base in pairs for result in lookup(arm, base).values() if result["curve"]]
    differences = [
        difference
        for base in plan.bases
        for pair in _CONTROLS[base]
        if (difference := between_arms(base, *pair, lookup)) is not None
    ]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    text = environment.from_string(_PAGE).render(
        missing=missing(finished, total),
        is_quick=is_quick,
        command="make methods ARGS=--quick" if is_quick else "make methods",
        scale=plan.scale,
        seeds=plan.seeds,
        folder=results.folder,
        columns=COLUMNS,
        rows=rows(plan, results, lookup),
        accuracy_goal=ACCURACY_GOAL,
        length_goal=LENGTH_GOAL,
        collapse=COLLAPSE,
        every=ARMS["opsd"].evaluate_every,
        plots=_write_plots(shown, themselves, page),
        parts=[_part(base, plan, lookup) for base in plan.bases],
        widths=f"{differences[0].half:.1f} points" if differences else "not known yet: how far it is",
        told=f"{100 * themselves['middling']['told']['solution']['test']['accuracy']:.1f} %"
        if "middling" in themselves
        else "an unknown share",
        bases=[f"the {BASES[base].title}" for base in plan.bases],
        knows=[
            f"{100 * result['final']['test']['accuracy']:.1f} % and {result['final']['test']['mean_tokens']:.1f} "
            f"tokens per answer ({base})"
            for base, result in themselves.items()
        ]
        or ["an accuracy that is not known yet"],
        tokens=plan.scale * (ARMS["opsd"].tokens or 0),
        batch=BATCH_SIZE,
        generated=f"{min(generated):,} to {max(generated):,}" if generated else "no",
        full_rates=len(FULL.learning_rates),
        full_seeds=len(FULL.seeds),
        seconds=f"{min(seconds):.0f} to {max(seconds):.0f}" if seconds else "",
        tuned=len(plan.learning_rates) > 1,
        rates=[f"{rate:g}" for rate in plan.learning_rates],
        tuning_seed=TUNING_SEED,
        core_hours=f"{sum(result.get('cpu_seconds', 0.0) for result in left.values()) / 3600:.1f}",
        failures=dict(sorted((run.name, result["error"]) for run, result in left.items() if "error" in result)),
    )
    page.write_text(text, encoding="utf-8")
    return [f"{finished} of {total} reported runs are there."]


def _write_plots(
    shown: dict[str, dict[str, Runs]], themselves: dict[str, Result], page: Path
) -> list[tuple[str, str]]:
    images = page.with_suffix("")
    images.mkdir(parents=True, exist_ok=True)
    plots = []
    for name, title, figure in (
        ("tokens", "Accuracy against generated tokens", accuracy_over_tokens(shown)),
        ("length", "Accuracy against the length of answers", accuracy_over_length(shown, themselves)),
    ):
        if figure is not None:
            figure.savefig(images / f"{name}.png", dpi=110)
            plots.append((title, f"{images.name}/{name}.png"))
    return plots


def _part(base: str, plan: Plan, lookup: Lookup) -> dict[str, object]:
    grpo = against_grpo(base, plan, lookup)
    fallen = collapses(base, plan, lookup)
    return {
        "title": BASES[base].title,
        "controls": [str(found) for pair in _CONTROLS[base] if (found := between_arms(base, *pair, lookup))],
        "families": [str(difference) for difference in between_families(base, plan, lookup)],
        "means": [
            f"{family} {100 * fmean(fmean(accuracies(runs, 'test')) for runs in arms.values()):.1f} % "
            f"({', '.join(ARMS[arm].title for arm in arms)})"
            for family, arms in families(base, plan, lookup).items()
        ],
        "grpo": [f"{outcome}: {', '.join(arms)}" for outcome, arms in grpo.items() if arms],
        "collapsed": f"Collapsed: {', '.join(fallen)}." if fallen else "No run that is there collapsed.",
    }
