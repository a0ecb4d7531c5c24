"""The report of the study: `study.md` and its plots, from whatever results there are."""

from functools import cache, partial
from pathlib import Path

import jinja2

from ..experiment.arms import BASES, TUNING_SEED
from ..experiment.runner import Plan, Results, missing
from .arms import ARMS, FULL
from .claims import NOT_RUN, Verdict, verdicts
from .plots import PLOTS
from .tables import arm_table, base_row, best_rows, gain_rows, group_rows, spacing, tuning_rows, within_opsds_tokens


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
Everything below is computed from the files in `{{ folder }}` by `{{ command }}`, which goes on where it was stopped;
no sentence about an outcome is written by hand. It is about models of 0.8 M parameters that add numbers: it can show
that a claim fails in a small world, or that nothing there contradicts it, and not how things are at scale.

## What the study says

| claim | paper | base | here |
|---|---|---|---|
{% for verdict in verdicts %}
| {{ verdict.claim }} | {{ verdict.source | paper }} | {{ verdict.base }} | **{{ verdict.outcome }}** |
{% endfor %}

The rules: a claim is a list of conditions. Each is a quantity with one value per seed that the claim says is
positive, with a 95 % interval and a margin, the least value that would matter: 2 points of accuracy, but 5 of what
is lost over many steps and 10 for a collapse; 5 points of length, but 2 between easy and hard; 1 marker per 1,000
tokens; 5 points of groups that lose their spread; anything above zero where a threshold is subtracted already. A
condition is met if its interval is above zero and its mean reaches the margin. It is refuted if the interval is
below the margin. It is open otherwise, and where nothing could show: both arms above 97 % or below 3 %, a GRPO that
gained less than 5 points with some seed, less than 10 points lost on average by the arms that are said to lose them,
a live teacher that neither taught 5 points nor lost 10 with some seed, or answers that became less than 10 %
shorter. A condition can be refuted, but not met, where some seed never reaches GRPO's best, and where an arm at its
best rate is said to collapse while that is the lowest rate of the grid. A claim holds here if all its conditions are
met, does not hold here if one is refuted, and cannot be seen here otherwise.

The interval is a t interval over the seeds. Seeds share the test problems, so that of an accuracy is widened by the
binomial error of both sides, as if each had problems of its own, which is too wide rather than too narrow: two arms
near 95 % are told apart from about 4 points on. Where easy problems are compared with hard ones, it is widened by the
error of the base's lengths. Intervals of other lengths, of markers and of learning curves say what another training
would give on the same problems. All are about these base models, not about others. Of {{ verdicts | length }} verdicts
at 95 %, one or two may be chance.

Some rules were changed after the first results were there, nearly all of them to ask for more. One asks for less:
that refreshing every step collapses is now seen against refreshing every 50 steps, which itself had to stay within
10 points of the base before.

{% for verdict in verdicts if verdict.outcome != not_run %}
- {{ verdict.claim }} ({{ verdict.base }} base): **{{ verdict.outcome }}**.
  {{ verdict.conditions | join("; ") }}.
{% endfor %}

{% if gains %}
## OPSD against GRPO

Generated tokens until a part of what GRPO gains is gained, at the first point of a learning curve that is as high:
there is one every {{ spacing.grpo }} tokens for GRPO, every {{ spacing.opsd }} for OPSD and every
{{ spacing.opsd_short }} for half its steps. The claim is judged by OPSD's usual schedule. "Never" is never with any
seed; "1 of 3", that the figure is about the one seed that gets there.

| base | part of GRPO's gain | accuracy, % | GRPO's tokens | OPSD's | times fewer | OPSD's, half the steps | fewer |
|---|---|---|---|---|---|---|---|
{% for row in gains %}
| {{ row | join(" | ") }} |
{% endfor %}

The same learning curves: where they start, their best points, and how much the last three points are above the three
before them.

| base | arm | generated tokens | first point, % | best point, % | still gaining, points | best, less GRPO's best |
|---|---|---|---|---|---|---|
{% for row in bests %}
| {{ row | join(" | ") }} |
{% endfor %}

Within the tokens that OPSD generates in all, the best point of GRPO is {{ within | join(" and ") }}. What OPSD's
teacher knows, reading the solution, is under Bases.

What the design does to this comparison: a point is of 200 problems, so the error of one near 97 % is 2.4 points.
GRPO's best is the highest of its points, so a little above what it can do, and OPSD has half as many points to reach
it. GRPO has one schedule, of 4 times OPSD's sequences, with a rate that falls to zero at its end: where both are
best at their ends, OPSD needs about 4 times fewer tokens whatever happened before. A shorter schedule of GRPO was
not tried.

{% endif %}
## Set-up

- **Adding.** Three-digit sums. A base model reasons column by column. Where a carry comes in, it doubts: it takes the
  column in two steps with `hm` or `wait` between them (`8+4=12 hm 13`). Solutions take it in one (`8+4+1=13`); terse
  solutions give the column sums only. Most rows a base is trained on show a reference ({{ shares }}): a solution, a
  terse one, or the answer. There it doubts less often, by construction: 10 %, 10 % and 50 % of the carries instead of
  80 %. Out of domain are four digits and the question in words, which the bases have met and the arms do not train on.
  How many rows show none, and for how long a base is trained, was found by trial: such that it knows little, or half,
  and yet can use a reference. A base that cannot would be no teacher.
- **Brevity.** Sums of two, three and four digits. The base elaborates, and in the rows it is trained on it does so
  less than half as often when it is told to be brief, which makes them 30 % shorter at all sizes. With no
  elaboration at all they would be 56, 55 and 55 % shorter.
- **Arms.** *GRPO* is TRL's, rewarded for right answers. *SFT* learns the solutions. *OPSD* is forward KL over the
  whole vocabulary to the base as it was, reading the solution; no clip, but where an arm is about it (0.05 per entry
  of the vocabulary). A *live* teacher is the student as it is at each step, reading the solution. *Off-policy*, the
  answers are the teacher's, sampled anew at each step, and the loss is the same. *SDFT* is TRL's with its own
  defaults: JSD, the 100 likeliest tokens, the base as it was for a teacher. *OPSDC* is reverse KL to a copy of the
  student that is told to be brief. Refreshed every 50 of 100 steps, the copy is renewed once.
- **Bases** are trained once. Another machine's rounding gives other ones, which may know more or less than these.
- **Seeds** {{ seeds | join(", ") }}. A seed decides the order of the rows and the sampling. Arms are compared seed by
  seed.
{% if tuned %}
  Every arm was tuned over the learning rates {{ rates | join(", ") }} on seed {{ tuning_seed }}, which is not
  reported, by its accuracy on problems that nothing else is tested on (with OPSDC, less its length as a share of the
  base's). Some arms take over a rate: half the steps and 5 times the steps that of plain OPSD, also with a live
  teacher and with the clip; "at the rate of" that of OPSDC refreshed every 50 steps. Where that is an arm's own rate
  too, its runs are the same.
{% else %}
  The learning rate is {{ rates | join(", ") }} for all arms.
{% endif %}
- **Schedules.** 10 steps of warm-up; then the rate falls to zero by a cosine. With OPSDC, as published, and over 5
  times the steps it stays constant.
- **Tests.** One sample per problem at temperature 1 and top-p 0.95: 300 problems held out, 200 longer, 200 in words.
  The learning curves are of 200 (brevity: 150) other problems. Right is an answer whose last box holds the sum and
  nothing else. It is cut off after {{ limits }}. Training samples at temperature 1 and top-p 1.
- **Budgets.** Arms take {{ steps }} steps of 32 sequences (OPSDC {{ opsdc_steps }}), GRPO twice the steps of twice the
  sequences, 8 to a problem. Generated tokens are those of rollouts, and of the teacher's samples off-policy. Learner
  tokens went forward and backward through the student, prompts included; the teacher's passes are not counted.
  Seconds are the processor time of the training alone, on one thread: what it takes on a core of its own. All runs
  that are there took {{ core_hours }} core-hours, tests included, the start of their processes (some 5 seconds each)
  not.

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
{% if groups %}
## GRPO's groups

| base | | first fifth of the steps | second | third | fourth | last |
|---|---|---|---|---|---|---|
{% for row in groups %}
| {{ row | join(" | ") }} |
{% endfor %}

{% endif %}
Mean ± standard deviation over the seeds; "–" was not run or has no such figure. A rate with * is at the end of the
grid, where a better one may lie beyond; with † some of its tuning failed. Points lost are those between the best
mean of three neighbouring points of the learning curve and the last. Groups without spread are all right or all
wrong. Bands in the plots go from the lowest to the highest seed.

{% for title, file in plots %}
![{{ title }}]({{ file }})

{% endfor %}
{% if tuning %}
## Tuning

What the rates were chosen by, on seed {{ tuning_seed }}: accuracy in percent, with OPSDC less the length in percent of
the base's. The best rate of an arm may still be worse than no training.

| arm | {{ rates | join(" | ") }} |
|---|{{ "---|" * rates | length }}
{% for row in tuning %}
| {{ row | join(" | ") }} |
{% endfor %}

{% endif %}
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
        results ([`~trl_opsd.experiment.runner.Results`]):
            Results, complete or not.
        plan ([`~trl_opsd.experiment.runner.Plan`]):
            What was to be run.
        page (`Path`):
            The page.

    Returns:
        `list[Verdict]`:
            What it says about the claims.
    """
    lookup, pairs = cache(partial(results.of_arm, plan)), plan.pairs()
    adding = [base for base in plan.bases if BASES[base].family.name == "adding"]
    left = results.all(plan)
    is_quick = plan.scale != FULL.scale
    judged = verdicts(lookup, plan.bases)
    images = page.with_suffix("")
    images.mkdir(parents=True, exist_ok=True)
    plots = []
    for base in plan.bases:
        arms = [arm for arm, its in pairs if its == base and lookup(arm, base)]
        # An arm whose runs are those of another would hide its curve
        arms = [arm for arm in arms if lookup(arm, base) != lookup(ARMS[arm].trained_as or "", base)]
        for name, title, draw in PLOTS[BASES[base].family.name]:
            figure = draw({arm: lookup(arm, base) for arm in arms}, f"{title}, {BASES[base].title}")
            if figure is not None:
                figure.savefig(images / f"{name}-{base}.png", dpi=110)
                plots.append((f"{title}, {BASES[base].title}", f"{images.name}/{name}-{base}.png"))

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["paper"] = lambda number: (
        f"[{number}](https://huggingface.co/papers/{number})" if number[0].isdigit() else number
    )
    text = environment.from_string(_PAGE).render(
        missing=missing(*results.num_reported(plan)),
        is_quick=is_quick,
        command="make study-quick" if is_quick else "make study",
        scale=plan.scale,
        steps=round(plan.scale * ARMS["opsd"].steps),
        opsdc_steps=round(plan.scale * ARMS["opsdc_50"].steps),
        folder=results.folder,
        verdicts=judged,
        not_run=NOT_RUN,
        shares=", ".join(
            f"{100 * BASES[base].recipe.context_share:g} % of those of the {BASES[base].title}" for base in adding
        ),
        seeds=plan.seeds,
        tuned=len(plan.learning_rates) > 1,
        rates=[f"{rate:g}" for rate in plan.learning_rates],
        tuning_seed=TUNING_SEED,
        limits=" and ".join(
            f"{family.max_completion_length} tokens ({family.name})"
            for family in {BASES[base].family.name: BASES[base].family for base in plan.bases}.values()
        ),
        core_hours=f"{sum(result.get('cpu_seconds', 0.0) for result in left.values()) / 3600:.1f}",
        gains=[row for base in adding for row in gain_rows(base, lookup)],
        spacing={arm: spacing(arm, adding, lookup) for arm in ("grpo", "opsd", "opsd_short")},
        bests=[row for base in adding for row in best_rows(base, lookup)],
        within=[f"{share} % ({base} base)" for base in adding if (share := within_opsds_tokens(base, lookup))],
        bases=[base_row(base, results.complete(plan.base_run(base))) for base in plan.bases],
        tables=[arm_table(base, plan, results, lookup) for base in plan.bases],
        groups=[row for base in adding for row in group_rows(base, lookup)],
        tuning=tuning_rows(plan, results),
        plots=plots,
        failures=dict(sorted((run.name, result["error"]) for run, result in left.items() if "error" in result)),
    )
    page.write_text(text, encoding="utf-8")
    return judged
