"""The report of the study: `study.md` and its plots, from whatever results there are."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from .arms import ARMS, BASES, STEPS, TUNING_SEED
from .claims import (
    NOT_RUN,
    Lookup,
    Result,
    Verdict,
    best_accuracy,
    drop,
    fewest_tokens,
    reduction,
    tokens_to_reach,
    verdicts,
)
from .runner import FULL, Plan, Results
from .train import Run


if TYPE_CHECKING:
    from matplotlib.figure import Figure


_PAGE = """\
# The study: published claims on embedded tasks

{% if missing %}
> {{ missing }}

{% endif %}
{% if is_quick %}
> This is the quick study: {{ seeds | length }} seeds, {{ "%.0f" | format(100 * scale) }} % of the steps, a few of the
> arms, and one learning rate for all of them, which nothing was tuned to. It shows that the machinery works. For
> results, run `make study`.

{% endif %}
Everything below is computed from the files in `{{ folder }}` by `make study`, which goes on where it was stopped; no
sentence about an outcome is written by hand. It is about models of 0.8 M parameters that add numbers: it can show that
a claim fails in a small world, or that nothing there contradicts it, and not how things are at scale.

## What the study says

| claim | base | here |
|---|---|---|
{% for verdict in verdicts %}
| {{ verdict.claim }} | {{ verdict.base }} | **{{ verdict.outcome }}** |
{% endfor %}

The rules: a claim is a list of conditions. Each is a quantity with one value per seed that the claim says is
positive, with a 95 % t interval over the seeds and a margin, the least value that would matter: 2 points of accuracy,
but 5 of what is lost over many steps and 10 for a collapse; 5 points of length, but 2 between easy and hard; 1 marker
per 1,000 tokens; anything above zero where a threshold is subtracted already. A condition is met if its interval is
above zero and its mean reaches the margin. It is refuted if the interval is below the margin. It is open otherwise,
and where nothing could show: both arms above 97 % or below 3 %, a GRPO that gained less than 5 points with some seed,
or nothing lost that the clip could prevent. A claim holds here if all its conditions are met, does not hold here if
one is refuted, and cannot be seen here otherwise. All runs start from one base, so the intervals are about training
it again, and not about other bases.

{% for verdict in verdicts if verdict.outcome != not_run %}
- {{ verdict.claim }} ({{ verdict.base }} base): **{{ verdict.outcome }}**.
  {{ verdict.conditions | join("; ") }}.
{% endfor %}

## Set-up

- **Adding.** Three-digit sums. A base model reasons column by column. Where a carry comes in, it doubts: it takes the
  column in two steps with `hm` or `wait` between them (`8+4=12 hm 13`). Solutions take it in one (`8+4+1=13`); terse
  solutions give the column sums only. Most rows a base is trained on show a reference ({{ shares }}): a solution, a
  terse one, or the answer. There it doubts less often, by construction: 10 %, 10 % and 50 % of the carries instead of
  80 %. Out of domain are four digits and the question in words, which the bases have met and the arms do not train on.
- **Brevity.** Sums of two, three and four digits. The base elaborates, and does so less than half as often when it is
  told to be brief. The instruction shortens problems of all sizes by about the same share.
- **Bases** are trained once. Another machine's rounding gives other ones, which may know more or less than these.
- **Seeds** {{ seeds | join(", ") }}. A seed decides the order of the rows and the sampling. Arms are compared seed by
  seed.
{% if tuned %}
  Every arm was tuned over the learning rates {{ rates }} on seed {{ tuning_seed }}, which is not reported, by its
  accuracy on problems that nothing else is tested on (with OPSDC, less its length as a share of the base's). Four
  kinds of arms take over the rate of the arm they are compared with: half the steps and 5 times the steps that of
  OPSD, and "at the rate of" that of OPSDC refreshed every 50 steps.
{% else %}
  The learning rate is {{ rates }} for all arms.
{% endif %}
- **Schedules.** The rate falls to zero by a cosine. With OPSDC, as published, and over 5 times the steps it stays
  constant.
- **Tests.** One sample per problem at temperature 1 and top-p 0.95: 300 problems held out, 200 longer, 200 in words.
  The learning curves are of 200 (brevity: 150) other problems. Training samples at temperature 1 and top-p 1.
- **Budgets.** Arms take {{ steps }} steps of 32 sequences (OPSDC 100 steps), GRPO twice the steps of twice the
  sequences, 8 to a problem. Generated tokens are those of rollouts, and of the teacher's samples off-policy. Learner
  tokens went forward and backward through the student, prompts included; the teacher's passes are not counted.
  Seconds are the processor time of the training alone, on one thread: what it takes on a core of its own.

## Bases

| base | held out, % | longer | in words | reading the solution | terse | the answer | tokens |
|---|---|---|---|---|---|---|---|
{% for row in bases %}
| {{ row | join(" | ") }} |
{% endfor %}

{% for table in tables %}
## {{ table.title }}

| {{ table.columns | join(" | ") }} |
|{{ "---|" * table.columns | length }}
{% for row in table.rows %}
| {{ row | join(" | ") }} |
{% endfor %}

{% endfor %}
{% if gains %}
## OPSD against GRPO

Generated tokens until a part of what GRPO gains is gained, on the learning curves. OPSD's are those of the schedule
that gets there first, the usual one or half of it.

| base | part of GRPO's gain | accuracy, % | GRPO's tokens | OPSD's tokens | times fewer |
|---|---|---|---|---|---|
{% for row in gains %}
| {{ row | join(" | ") }} |
{% endfor %}

{% endif %}
{% if groups %}
## GRPO's groups without reward spread, %

| base | first fifth of the steps | second | third | fourth | last |
|---|---|---|---|---|---|
{% for row in groups %}
| {{ row | join(" | ") }} |
{% endfor %}

{% endif %}
Mean ± standard deviation over the seeds; "–" is not run. A rate with * is at the end of the grid, where a better one
may lie beyond; with † some of its tuning failed. Points lost are those between the best mean of three neighbouring
points of the learning curve and the last. Groups without spread are all right or all wrong. Arms that generate nothing
have no tokens to reach GRPO's best with.

{% for title, file in plots %}
![{{ title }}]({{ file }})

{% endfor %}
{% if failures %}
## Runs that failed

{% for name, error in failures.items() %}
- `{{ name }}`: {{ error }}
{% endfor %}
{% endif %}
"""


def write_report(results: Results, plan: Plan, page: Path) -> list[Verdict]:
    """
    Writes the page, and its plots into a folder of the page's name beside it.

    Args:
        results ([`~trl_opsd.study.runner.Results`]):
            Results, complete or not.
        plan ([`~trl_opsd.study.runner.Plan`]):
            What was to be run.
        page (`Path`):
            The page.

    Returns:
        `list[Verdict]`:
            What it says about the claims.
    """
    found: dict[tuple[str, str], dict[int, Result]] = {}

    def lookup(arm: str, base: str) -> dict[int, Result]:
        if (arm, base) not in found:
            result = results.complete(Run(base))
            if arm == "base":
                found[arm, base] = {} if result is None else dict.fromkeys(plan.seeds, result)
            else:
                found[arm, base] = results.reported(plan, arm, base) if (arm, base) in plan.pairs() else {}
        return found[arm, base]

    pairs = plan.pairs()
    finished = sum(len(lookup(arm, base)) for arm, base in pairs)
    total = len(pairs) * len(plan.seeds)
    missing = "" if finished == total else f"Not complete: {finished} of the {total} reported runs are there."
    judged = verdicts(lookup, plan.bases)
    images = page.with_suffix("")
    images.mkdir(parents=True, exist_ok=True)
    plots = []
    for base in plan.bases:
        arms = [arm for arm, its in pairs if its == base and lookup(arm, base)]
        for name, title, draw in _PLOTS[BASES[base].family.name]:
            figure = draw({arm: lookup(arm, base) for arm in arms}, f"{title}, {BASES[base].title}")
            if figure is not None:
                figure.savefig(images / f"{name}-{base}.png", dpi=110)
                plots.append((f"{title}, {BASES[base].title}", f"{images.name}/{name}-{base}.png"))

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    text = environment.from_string(_PAGE).render(
        missing=missing,
        is_quick=plan.scale != FULL.scale,
        scale=plan.scale,
        steps=STEPS,
        folder=results.folder,
        verdicts=judged,
        not_run=NOT_RUN,
        shares=", ".join(
            f"{100 * BASES[base].recipe.context_share:g} % of those of the {BASES[base].title}"
            for base in plan.bases
            if BASES[base].family.name == "adding"
        ),
        seeds=plan.seeds,
        tuned=len(plan.learning_rates) > 1,
        rates=", ".join(f"{rate:g}" for rate in plan.learning_rates),
        tuning_seed=TUNING_SEED,
        bases=[_base_row(base, results.complete(Run(base))) for base in plan.bases],
        tables=[_table(base, plan, results, lookup) for base in plan.bases],
        gains=_gains_table(plan.bases, lookup),
        groups=_groups_table(pairs, lookup),
        plots=plots,
        failures=results.failures(plan),
    )
    page.write_text(text, encoding="utf-8")
    return judged


# Tables


def _spread(values: Sequence[float | None], form: str = "{:.1f}", scale: float = 1.0) -> str:
    """Mean ± standard deviation, and how many of the seeds it is about if not all have a value."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return "–" if not values else "never"
    shown = form.format(fmean(known)) + (f" ± {form.format(stdev(known))}" if len(known) > 1 else "")
    return shown if len(known) == len(values) else f"{shown} ({len(known)} of {len(values)})"


def _base_row(base: str, result: Result | None) -> list[str]:
    if result is None:
        return [base, *["–"] * 7]

    def accuracy(figures: Mapping[str, Any], split: str) -> str:
        return f"{100 * figures[split]['accuracy']:.1f}" if split in figures else "–"

    return [
        base,
        *(accuracy(result["final"], split) for split in ("test", "longer", "words")),
        *(accuracy(result["told"].get(column, {}), "test") for column in ("solution", "terse", "answer")),
        f"{result['final']['test']['mean_tokens']:.1f}",
    ]


def _gains_table(bases: Sequence[str], lookup: Lookup) -> list[list[str]]:
    """Tokens that GRPO and OPSD need for parts of GRPO's gain."""
    rows = []
    for base in bases:
        grpo, opsd, short = (lookup(arm, base) for arm in ("grpo", "opsd", "opsd_short"))
        for part in (0.5, 0.75, 0.9, 1.0) if grpo.keys() & opsd.keys() else ():
            targets, theirs, ours = [], [], []
            for seed in sorted(grpo.keys() & opsd.keys()):
                start, best = grpo[seed]["curve"][0]["accuracy"], best_accuracy(grpo[seed])
                target = best - (1 - part) * (best - start)
                targets.append(target)
                theirs.append(tokens_to_reach(grpo[seed], target))
                ours.append(fewest_tokens([runs[seed] for runs in (opsd, short) if seed in runs], target))
            pairs = zip(theirs, ours, strict=True)
            ratios = [their / our if their and our else None for their, our in pairs]
            rows.append(
                [
                    base,
                    f"{100 * part:g} %",
                    _spread(targets, scale=100),
                    *(_spread(tokens, "{:,.0f}") for tokens in (theirs, ours)),
                    _spread(ratios),
                ]
            )
    return rows


def _groups_table(pairs: Sequence[tuple[str, str]], lookup: Lookup) -> list[list[str]]:
    """Share of GRPO's groups without spread in each fifth of the training."""
    rows = []
    for arm, base in pairs:
        if ARMS[arm].trainer != "grpo" or not lookup(arm, base):
            continue
        series = [result["series"]["frac_reward_zero_std"] for result in lookup(arm, base).values()]
        fifths = [[float(np.mean(part)) for part in np.array_split(values, 5)] for values in series]
        rows.append([base, *(_spread(list(fifth), "{:.0f}", 100) for fifth in zip(*fifths, strict=True))])
    return rows


def _table(base: str, plan: Plan, results: Results, lookup: Lookup) -> dict[str, Any]:
    is_adding = BASES[base].family.name == "adding"
    arms = [arm for arm, its in plan.pairs() if its == base]
    special = _ADDING_COLUMNS if is_adding else _BREVITY_COLUMNS
    rows = []
    for arm in arms:
        done = lookup(arm, base)
        rate = results.learning_rate(plan, arm, base) if results.is_tuned(plan, arm, base) else None
        at_end = len(plan.learning_rates) > 1 and rate in (min(plan.learning_rates), max(plan.learning_rates))
        failed = any(results.complete(run) is None for run in plan.tuning_runs(arm, base))
        final = [result["final"]["test"] for result in done.values()]
        rows.append(
            [
                ARMS[arm].title,
                f"{len(done)} of {len(plan.seeds)}",
                "–" if rate is None else f"{rate:g}{'*' if at_end else ''}{'†' if failed else ''}",
                _spread([figures["accuracy"] for figures in final], scale=100),
                *(_spread(column(done, base, lookup), form) for column, form in special.values()),
                *(_spread([result[name] for result in done.values()], "{:,.0f}") for name in _BUDGETS),
            ]
        )
    return {
        "title": f"Arms from the {BASES[base].title}",
        "columns": ["arm", "seeds", "rate", "held out, %", *special, *_BUDGETS.values()],
        "rows": rows,
    }


_BUDGETS = {"generated_tokens": "generated tokens", "learner_tokens": "learner tokens", "seconds": "seconds"}

Column = Callable[[dict[int, Result], str, Lookup], list[float | None]]


def _on(split: str, name: str, scale: float = 1.0) -> Column:
    return lambda done, base, lookup: [scale * result["final"][split][name] for result in done.values()]


def _to_grpo(done: dict[int, Result], base: str, lookup: Lookup) -> list[float | None]:
    grpo = lookup("grpo", base)
    return [
        tokens_to_reach(result, best_accuracy(grpo[seed]))
        for seed, result in done.items()
        if seed in grpo and result["generated_tokens"]
    ]


def _lost(done: dict[int, Result], base: str, lookup: Lookup) -> list[float | None]:
    return [100 * drop(result) for result in done.values()]


def _shorter(digits: str | None) -> Column:
    def column(done: dict[int, Result], base: str, lookup: Lookup) -> list[float | None]:
        bases = lookup("base", base)
        return [100 * reduction(result, bases[seed], digits) for seed, result in done.items() if seed in bases]

    return column


_ADDING_COLUMNS: dict[str, tuple[Column, str]] = {
    "longer, %": (_on("longer", "accuracy", 100), "{:.1f}"),
    "in words, %": (_on("words", "accuracy", 100), "{:.1f}"),
    "markers per 1k": (_on("test", "markers_per_1k"), "{:.1f}"),
    "tokens per answer": (_on("test", "mean_tokens"), "{:.1f}"),
    "lost since its best, points": (_lost, "{:.1f}"),
    "tokens to GRPO's best": (_to_grpo, "{:,.0f}"),
}

_BREVITY_COLUMNS: dict[str, tuple[Column, str]] = {
    "tokens per answer": (_on("test", "mean_tokens"), "{:.1f}"),
    "shorter, %": (_shorter(None), "{:.1f}"),
    "2 digits, %": (_shorter("2"), "{:.1f}"),
    "3 digits, %": (_shorter("3"), "{:.1f}"),
    "4 digits, %": (_shorter("4"), "{:.1f}"),
}


# Plots


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
_PLOTS: dict[str, tuple[tuple[str, str, Draw], ...]] = {
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
