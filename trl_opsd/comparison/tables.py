"""The table of the comparison, and sentences that its figures support."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, variance

from ..eval.statistics import student_t
from ..experiment.arms import BASES
from ..experiment.figures import Result, drop, interval, spread, with_interval
from ..experiment.runner import Plan, Results
from ..methods import METHODS
from .arms import ARMS, Family, family_of


# An accuracy to reach, and a length as a share of the base's, with at most so much accuracy lost
ACCURACY_GOAL = 0.8
LENGTH_GOAL = 0.7
COLLAPSE = 0.1

Runs = Mapping[int, Result]
# The complete results of an arm on a base, by seed; the base itself is the arm "base"
Lookup = Callable[[str, str], Runs]


def sampling_error(base: str, split: str, accuracies: Sequence[float]) -> float:
    """Standard error of a mean accuracy by the number of its problems, which all seeds share."""
    mean = fmean(accuracies)
    return math.sqrt(mean * (1 - mean) / BASES[base].family.splits[split].rows)


def accuracies(runs: Runs, split: str) -> list[float]:
    """Final accuracies on a split, none where the base has no such split."""
    return [result["final"][split]["accuracy"] for result in runs.values() if split in result["final"]]


def accuracy(base: str, runs: Runs, split: str) -> str:
    """Final accuracy on a split in percent, with its interval."""
    values = accuracies(runs, split)
    return with_interval(values, sampling_error(base, split, values) if values else 0.0, 100)


def reaches(base: str, result: Result) -> dict[str, float] | None:
    """The first point of a learning curve that is good enough, `None` if there is none."""
    first = result["curve"][0]
    for point in result["curve"]:
        if BASES[base].family.name == "adding":
            good = point["accuracy"] >= ACCURACY_GOAL
        else:
            short = point["mean_tokens"] <= LENGTH_GOAL * first["mean_tokens"]
            good = short and point["accuracy"] >= first["accuracy"] - COLLAPSE
        if good:
            return point
    return None


def collapsed(result: Result, base: Result) -> bool:
    """Whether a run ended more than 10 points below its base."""
    return result["final"]["test"]["accuracy"] < base["final"]["test"]["accuracy"] - COLLAPSE


COLUMNS = (
    "base",
    "arm",
    "learns by; its teacher reads",
    "seeds",
    "rate",
    "held out, %",
    "longer, %",
    "in words, %",
    "tokens per answer",
    "markers per 1k",
    "cut off, %",
    "steps",
    "generated tokens",
    "tokens to the goal",
    "seconds to it",
    "seconds in all",
    "lost since its best, points",
    "collapsed",
)


def rows(plan: Plan, results: Results, lookup: Lookup) -> list[list[str]]:
    """The rows of the table, base by base: the base itself, and every arm, whether or not it has results."""
    made = []
    for base in plan.bases:
        itself = dict(list(lookup("base", base).items())[:1])
        made.append([base, "the base itself", "–", "–", "–", *_final(base, itself), *["–"] * 7])
        for arm in [arm for arm, its in plan.pairs() if its == base]:
            runs = lookup(arm, base)
            wanted = len(plan.reported_runs(arm, base, None))
            cells = [base, ARMS[arm].title, str(family_of(ARMS[arm])), f"{len(runs)} of {wanted}"]
            made.append([*cells, _rate(plan, results, arm, base), *_final(base, runs), *_course(base, runs, lookup)])
    return made


def _rate(plan: Plan, results: Results, arm: str, base: str) -> str:
    rate = results.learning_rate(plan, arm, base) if results.is_tuned(plan, arm, base) else None
    if rate is None:
        return "–"
    at_end = len(plan.learning_rates) > 1 and rate in (min(plan.learning_rates), max(plan.learning_rates))
    failed = any(results.complete(run) is None for run in plan.tuning_runs(arm, base))
    return f"{rate:g}{'*' if at_end else ''}{'†' if failed else ''}"


def _final(base: str, runs: Runs) -> list[str]:
    figures = [result["final"]["test"] for result in runs.values()]
    return [
        *(accuracy(base, runs, split) for split in ("test", "longer", "words")),
        with_interval([its["mean_tokens"] for its in figures]),
        with_interval([its["markers_per_1k"] for its in figures]),
        with_interval([its["truncated"] for its in figures], scale=100, form="{:.0f}"),
    ]


def _course(base: str, runs: Runs, lookup: Lookup) -> list[str]:
    trained = [result for result in runs.values() if result["curve"]]
    if not trained:
        return ["–"] * 7
    points = [reaches(base, result) for result in trained]
    [itself, *_] = lookup("base", base).values()
    return [
        spread([result["steps"] for result in trained], "{:.0f}"),
        spread([result["generated_tokens"] for result in trained], "{:,.0f}"),
        spread([None if point is None else point["generated_tokens"] for point in points], "{:,.0f}"),
        spread([None if point is None else point["seconds"] for point in points], "{:.0f}"),
        spread([result["seconds"] for result in trained], "{:.0f}"),
        with_interval([100 * drop(result) for result in trained]),
        f"{sum(collapsed(result, itself) for result in trained)} of {len(trained)}",
    ]


# What the figures support


@dataclass(frozen=True)
class Difference:
    """
    How far one side is above another.

    Args:
        text (`str`):
            What is compared.
        mean (`float`):
            Mean difference in points.
        half (`float`):
            Half of its 95 % interval.
    """

    text: str
    mean: float
    half: float

    @property
    def outcome(self) -> str:
        """`"above"`, `"below"` or `"not told apart"`."""
        if abs(self.mean) <= self.half:
            return "not told apart"
        return "above" if self.mean > 0 else "below"

    def __str__(self) -> str:
        return f"{self.text}: {self.mean:+.1f} ± {self.half:.1f} points ({self.outcome})"


def between_arms(base: str, one: str, other: str, lookup: Lookup, split: str = "test") -> Difference | None:
    """
    Accuracy of one arm less that of another, seed by seed, widened by the error of testing on a few hundred problems.

    Args:
        base (`str`):
            Name of the base.
        one (`str`):
            Name of an arm.
        other (`str`):
            Name of the arm it is compared with. `"base"` is the base itself.
        lookup (`Callable[[str, str], Mapping[int, Result]]`):
            Results by arm and base.
        split (`str`, *optional*, defaults to `"test"`):
            Split of the problems.

    Returns:
        [`Difference`] or `None`:
            The difference, `None` with fewer than two seeds that both have.
    """
    ones, others = lookup(one, base), lookup(other, base)
    seeds = sorted(ones.keys() & others.keys())
    if len(seeds) < 2:
        return None
    pairs = [accuracies({seed: runs[seed] for seed in seeds}, split) for runs in (ones, others)]
    error = math.hypot(*(sampling_error(base, split, values) for values in pairs))
    mean, low, _ = interval([100 * (a - b) for a, b in zip(*pairs, strict=True)], 100 * error)
    names = [name if name == "base" else ARMS[name].title for name in (one, other)]
    return Difference(f"{names[0]} − {names[1]}", mean, mean - low)


def families(base: str, plan: Plan, lookup: Lookup) -> dict[Family, dict[str, Runs]]:
    """The methods that have results on a base, by their family. Controls and TRL's trainers are in none."""
    found: dict[Family, dict[str, Runs]] = {}
    for arm, its in plan.pairs():
        if its == base and arm in METHODS and lookup(arm, base):
            found.setdefault(family_of(ARMS[arm]), {})[arm] = lookup(arm, base)
    return found


def between_families(base: str, plan: Plan, lookup: Lookup) -> list[Difference]:
    """
    Held-out accuracy of one family of methods less that of another, by Welch's t interval over the methods, each with
    the mean of its seeds. Families of a single method are left out.
    """
    means = {
        family: [100 * fmean(accuracies(runs, "test")) for runs in arms.values()]
        for family, arms in families(base, plan, lookup).items()
        if len(arms) > 1
    }
    found = []
    for (one, ones), (other, others) in combinations(means.items(), 2):
        parts = [variance(values) / len(values) for values in (ones, others)]
        degrees = [part**2 / (len(values) - 1) for part, values in zip(parts, (ones, others), strict=True)]
        freedom = max(1, math.floor(sum(parts) ** 2 / sum(degrees))) if sum(degrees) else 1
        text = f"{one} ({len(ones)} methods) − {other} ({len(others)})"
        found.append(Difference(text, fmean(ones) - fmean(others), student_t(freedom) * math.sqrt(sum(parts))))
    return found


def against_grpo(base: str, plan: Plan, lookup: Lookup) -> dict[str, list[str]]:
    """The methods that end above GRPO, below it, or cannot be told apart from it."""
    found: dict[str, list[str]] = {"above": [], "below": [], "not told apart": []}
    for arm, its in plan.pairs():
        if its == base and arm in METHODS:
            difference = between_arms(base, arm, "grpo", lookup)
            if difference is not None:
                found[difference.outcome].append(arm)
    return found


def collapses(base: str, plan: Plan, lookup: Lookup) -> list[str]:
    """The arms of which a run ended more than 10 points below the base."""
    found = []
    for arm, its in plan.pairs():
        runs = lookup(arm, base) if its == base else {}
        itself = next(iter(lookup("base", base).values()), None)
        number = sum(collapsed(result, itself) for result in runs.values() if result["curve"]) if itself else 0
        if number:
            found.append(f"{ARMS[arm].title} ({number} of {len(runs)})")
    return found
