"""The tables of the study's report, as rows of cells."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from ..experiment.arms import BASES
from ..experiment.figures import Result, best_accuracy, drop, reduction, spread, tokens_to_reach
from ..experiment.runner import Job, Plan, Results
from .arms import ARMS
from .claims import Lookup, fifths


def base_row(base: str, result: Result | None) -> list[str]:
    """What a base knows, and what it knows reading a reference."""
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


# OPSD against GRPO


def gain_rows(base: str, lookup: Lookup) -> list[list[str]]:
    """Tokens that GRPO and OPSD need for parts of GRPO's gain."""
    grpo = lookup("grpo", base)
    rows = []
    for part in (0.5, 0.75, 0.9, 1.0) if grpo else ():
        targets = {}
        for seed, result in grpo.items():
            best = best_accuracy(result)
            targets[seed] = best - (1 - part) * (best - result["curve"][0]["accuracy"])
        theirs = {seed: tokens_to_reach(grpo[seed], target) for seed, target in targets.items()}
        row = [base, f"{100 * part:g} %", spread(list(targets.values()), scale=100)]
        row.append(spread(list(theirs.values()), "{:,.0f}"))
        for arm in ("opsd", "opsd_short"):
            runs = lookup(arm, base)
            ours = {seed: tokens_to_reach(runs[seed], target) for seed, target in targets.items() if seed in runs}
            ratios = [their / our if (their := theirs[seed]) and our else None for seed, our in ours.items()]
            row += [spread(list(ours.values()), "{:,.0f}"), spread(ratios)]
        rows.append(row)
    return rows


def spacing(arm: str, bases: Sequence[str], lookup: Lookup) -> str:
    """Generated tokens from one point of an arm's learning curves to the next."""
    results = [result for base in bases for result in lookup(arm, base).values()]
    return spread([result["generated_tokens"] / (len(result["curve"]) - 1) for result in results], "{:,.0f}")


def best_rows(base: str, lookup: Lookup) -> list[list[str]]:
    """The best points of GRPO's and OPSD's learning curves, what OPSD's are less GRPO's, and where they start."""
    grpo = lookup("grpo", base)
    rows = []
    for arm in ("grpo", "opsd", "opsd_short", "opsd_long"):
        done = lookup(arm, base)
        if done:
            rows.append(
                [
                    base,
                    ARMS[arm].title,
                    spread([result["generated_tokens"] for result in done.values()], "{:,.0f}"),
                    spread([result["curve"][0]["accuracy"] for result in done.values()], scale=100),
                    spread([best_accuracy(result) for result in done.values()], scale=100),
                    spread([gain_at_end(result) for result in done.values()], "{:+.1f}", 100),
                    spread(
                        [
                            best_accuracy(result) - best_accuracy(grpo[seed])
                            for seed, result in done.items()
                            if seed in grpo
                        ],
                        "{:+.1f}",
                        100,
                    ),
                ]
            )
    return rows


def gain_at_end(result: Result) -> float:
    """Accuracy that the last three points of a learning curve are above the three before, on average."""
    curve = [point["accuracy"] for point in result["curve"]]
    return fmean(curve[-3:]) - fmean(curve[-6:-3] or curve[:1])


def within_opsds_tokens(base: str, lookup: Lookup) -> str | None:
    """GRPO's best accuracy within the tokens that OPSD generates in all. `None` if one of the arms is missing."""
    grpo, opsd = lookup("grpo", base), lookup("opsd", base)
    bests = [
        max(
            point["accuracy"]
            for point in grpo[seed]["curve"]
            if point["generated_tokens"] <= opsd[seed]["generated_tokens"]
        )
        for seed in grpo.keys() & opsd.keys()
    ]
    return spread(bests, scale=100) if bests else None


def group_rows(base: str, lookup: Lookup) -> list[list[str]]:
    """GRPO's groups without spread, and its rewards, in each fifth of the training."""
    rows = []
    for title, name in (("groups without spread, %", "frac_reward_zero_std"), ("mean reward, %", "reward")):
        series = [fifths(result["series"][name]) for result in lookup("grpo", base).values()]
        if series:
            rows.append([base, title, *(spread(part, "{:.0f}", 100) for part in zip(*series, strict=True))])
    return rows


# Arms


def arm_table(base: str, plan: Plan, results: Results, lookup: Lookup) -> dict[str, Any]:
    """Title, columns and rows of the table of a base's arms, the base itself first."""
    special = _ADDING_COLUMNS if BASES[base].family.name == "adding" else _BREVITY_COLUMNS

    def figures(done: dict[int, Result]) -> list[str]:
        return [spread(column(done, base, lookup), form) for column, form in special.values()]

    itself = dict(list(lookup("base", base).items())[:1])
    rows = [[f"the {BASES[base].title} itself", "–", "–", *figures(itself), *["–"] * len(_BUDGETS)]]
    for arm in [arm for arm, its in plan.pairs() if its == base]:
        done = lookup(arm, base)
        wanted = len(plan.reported_runs(arm, base, None))
        rate = results.learning_rate(plan, arm, base) if results.is_tuned(plan, arm, base) else None
        at_end = len(plan.learning_rates) > 1 and rate in (min(plan.learning_rates), max(plan.learning_rates))
        failed = any(results.complete(run) is None for run in plan.tuning_runs(arm, base))
        rows.append(
            [
                ARMS[arm].title,
                f"{len(done)} of {wanted}",
                "–" if rate is None else f"{rate:g}{'*' if at_end else ''}{'†' if failed else ''}",
                *figures(done),
                *(spread([result[name] for result in done.values()], "{:,.0f}") for name in _BUDGETS),
            ]
        )
    return {
        "title": f"Arms from the {BASES[base].title}",
        "columns": ["arm", "seeds", "rate", *special, *_BUDGETS.values()],
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
    return [100 * drop(result) for result in done.values() if result["curve"]]


def _shorter(digits: str | None) -> Column:
    def column(done: dict[int, Result], base: str, lookup: Lookup) -> list[float | None]:
        bases = lookup("base", base)
        return [100 * reduction(result, bases[seed], digits) for seed, result in done.items() if seed in bases]

    return column


_ACCURACY: Column = _on("test", "accuracy", 100)
_TOKENS: Column = _on("test", "mean_tokens")
_CUT_OFF: Column = _on("test", "truncated", 100)

_ADDING_COLUMNS: dict[str, tuple[Column, str]] = {
    "held out, %": (_ACCURACY, "{:.1f}"),
    "longer, %": (_on("longer", "accuracy", 100), "{:.1f}"),
    "in words, %": (_on("words", "accuracy", 100), "{:.1f}"),
    "markers per 1k": (_on("test", "markers_per_1k"), "{:.1f}"),
    "tokens per answer": (_TOKENS, "{:.1f}"),
    "cut off, %": (_CUT_OFF, "{:.0f}"),
    "longer cut off, %": (_on("longer", "truncated", 100), "{:.0f}"),
    "lost since its best, points": (_lost, "{:.1f}"),
    "tokens to GRPO's best": (_to_grpo, "{:,.0f}"),
}

_BREVITY_COLUMNS: dict[str, tuple[Column, str]] = {
    "held out, %": (_ACCURACY, "{:.1f}"),
    "tokens per answer": (_TOKENS, "{:.1f}"),
    "cut off, %": (_CUT_OFF, "{:.0f}"),
    "shorter, %": (_shorter(None), "{:.1f}"),
    "2 digits, %": (_shorter("2"), "{:.1f}"),
    "3 digits, %": (_shorter("3"), "{:.1f}"),
    "4 digits, %": (_shorter("4"), "{:.1f}"),
}


# Tuning


def tuning_rows(plan: Plan, results: Results) -> list[list[str]]:
    """What each arm was tuned by at each rate, in percent, the base itself first."""

    def shown(run: Job) -> str:
        score = results.score(run)
        return "–" if score is None else f"{100 * score:.1f}"

    rows = []
    for base in plan.bases:
        arms = [arm for arm, its in plan.pairs() if its == base and ARMS[arm].tuned_as is None]
        tuned = [(ARMS[arm].title, runs) for arm in arms if (runs := plan.tuning_runs(arm, base))]
        if tuned:
            rows.append(
                [f"the {BASES[base].title} itself", shown(plan.base_run(base)), *["" for _ in plan.learning_rates[1:]]]
            )
        rows += [[title, *map(shown, runs)] for title, runs in tuned]
    return rows
