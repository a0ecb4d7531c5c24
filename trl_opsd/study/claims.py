"""
The published claims, and the rules that decide what the study says about them.

Every claim is a list of conditions, each a quantity with one value per seed that the claim says is positive. A
condition has a margin, the least value that would matter, and a 95 % interval: a t interval over the seeds, widened
for accuracies by the error of testing on a few hundred problems, which the seeds share.

- It is *met* if the interval lies above zero and the mean reaches the margin.
- It is *refuted* if the interval lies below the margin.
- Otherwise, or if what it rests on did not happen (both arms at the ceiling, GRPO that learnt nothing), it is *open*.

A claim holds here if all of its conditions are met, does not hold here if one is refuted, and cannot be seen here
otherwise. With a run missing that would be needed for two seeds, it was not run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TypeVar

import numpy as np

from ..experiment.arms import BASES
from ..experiment.figures import Result, best_accuracy, drop, interval, reduction, tokens_to_reach
from .arms import ARMS, LEARNING_RATES


HOLDS, FAILS, UNSEEN, NOT_RUN = "holds here", "does not hold here", "cannot be seen here", "not run"

Metric = Callable[[Result], float]
# The complete results of an arm on a base, by seed; the base itself is the arm "base".
Lookup = Callable[[str, str], dict[int, Result]]

_CEILING, _FLOOR = 0.97, 0.03
# What an arm loses or shortens at least, for there to be something to compare
_SOMETHING = 0.1
# Standard deviation of the length of a base's answers to problems of one size, as a share of their mean
_LENGTH_SPREAD = 0.15

Value = TypeVar("Value")


def points(value: float) -> str:
    """A share, as percent points with a sign."""
    return f"{100 * value:+.1f}"


@dataclass(frozen=True)
class Condition:
    """
    A quantity that a claim says is positive.

    Args:
        text (`str`):
            What it is.
        values (`list[float]`):
            One per seed.
        margin (`float`):
            Least value that would matter.
        error (`float`, *optional*, defaults to `0.0`):
            Standard error of the mean that more seeds would not lessen.
        obstacle (`str`, *optional*):
            Why it cannot be judged, whatever its values.
        doubt (`str`, *optional*):
            Why it cannot be met, though it can be refuted.
        shown (`Callable[[float], str]`, *optional*, defaults to `points`):
            How a value is written.
    """

    text: str
    values: list[float]
    margin: float
    error: float = 0.0
    obstacle: str | None = None
    doubt: str | None = None
    shown: Callable[[float], str] = points

    def interval(self) -> tuple[float, float, float]:
        """Mean over the seeds, and the ends of its 95 % interval."""
        return interval(self.values, self.error)

    def state(self) -> str:
        """`"missing"`, `"open"`, `"met"` or `"refuted"`."""
        if len(self.values) < 2:
            return "missing"
        if self.obstacle is not None:
            return "open"
        mean, low, high = self.interval()
        if low > 0 and mean >= self.margin and self.doubt is None:
            return "met"
        return "refuted" if high < self.margin else "open"

    def __str__(self) -> str:
        if self.state() == "missing":
            return f"{self.text}: not run"
        mean, low, high = map(self.shown, self.interval())
        why = self.obstacle or self.doubt
        state = self.state() if why is None else f"{self.state()}: {why}"
        return f"{self.text} {mean} [{low}, {high}] over {len(self.values)} seeds ({state})"


@dataclass(frozen=True)
class Verdict:
    """
    What the study says about a claim on one base.

    Args:
        claim (`str`):
            The claim.
        source (`str`):
            Number of its paper, as in `huggingface.co/papers/<number>`, or "ours".
        base (`str`):
            Name of the base.
        outcome (`str`):
            `HOLDS`, `FAILS`, `UNSEEN` or `NOT_RUN`.
        conditions (`list[Condition]`):
            What it rests on.
    """

    claim: str
    source: str
    base: str
    outcome: str
    conditions: list[Condition]


def judge(conditions: Sequence[Condition]) -> str:
    """
    Turns conditions into what the study says.

    Args:
        conditions (`Sequence[Condition]`):
            The conditions of a claim.

    Returns:
        `str`:
            `HOLDS`, `FAILS`, `UNSEEN` or `NOT_RUN`.
    """
    states = [condition.state() for condition in conditions]
    if "missing" in states:
        return NOT_RUN
    if "refuted" in states:
        return FAILS
    return HOLDS if all(state == "met" for state in states) else UNSEEN


# Metrics of a result


def _markers(result: Result) -> float:
    return result["final"]["test"]["markers_per_1k"]


def fifths(series: Sequence[float]) -> list[float]:
    """Means of the five parts, as equal as can be, of a series with one value per step."""
    return [fmean(part.tolist()) for part in np.array_split(np.asarray(series), 5)]


# Conditions


def _values(
    lookup: Lookup, base: str, first: str, second: str, value: Callable[[Result, Result], Value]
) -> list[Value]:
    ones, others = lookup(first, base), lookup(second, base)
    return [value(ones[seed], others[seed]) for seed in sorted(ones.keys() & others.keys())]


def _accuracy_difference(
    lookup: Lookup, base: str, text: str, better: str, worse: str, split: str = "test", margin: float = 0.02
) -> Condition:
    def accuracy(result: Result) -> float:
        return result["final"][split]["accuracy"]

    pairs = _values(lookup, base, better, worse, lambda one, other: (accuracy(one), accuracy(other)))
    values = [one - other for one, other in pairs]
    if not values:
        return Condition(text, values, margin)
    means = [fmean(side) for side in zip(*pairs, strict=True)]
    obstacle = None
    if min(means) > _CEILING:
        obstacle = "both at the ceiling"
    elif max(means) < _FLOOR:
        obstacle = "both at the floor"
    text = f"{text} ({100 * means[0]:.1f} − {100 * means[1]:.1f} %)"
    error = math.sqrt(sum(mean * (1 - mean) for mean in means) / BASES[base].family.splits[split].rows)
    return Condition(text, values, margin, error, obstacle)


def _tokens(lookup: Lookup, base: str) -> list[Condition]:
    opsd, grpo = lookup("opsd", base), lookup("grpo", base)
    ratios, gains, reached = [], [], 0
    for seed in sorted(opsd.keys() & grpo.keys()):
        target = best_accuracy(grpo[seed])
        gains.append(target - grpo[seed]["curve"][0]["accuracy"])
        needed, reference = tokens_to_reach(opsd[seed], target), tokens_to_reach(grpo[seed], target)
        assert reference is not None
        reached += needed is not None
        # Where it never gets there, all of its tokens give the most that the ratio can be
        least = opsd[seed]["generated_tokens"] if needed is None else needed
        ratios.append(math.log2(max(reference, 1) / max(least, 1)) - 2)
    return [
        Condition(
            "times fewer tokens to GRPO's best accuracy, 4 being asked for:",
            ratios,
            0.0,
            obstacle="GRPO's best is less than 5 points above the base" if gains and min(gains) < 0.05 else None,
            doubt=f"reached by {reached} of {len(ratios)} seeds" if reached < len(ratios) else None,
            shown=lambda value: f"{4 * 2**value:.1f}",
        )
    ]


def _beats(suffix: str, split: str) -> Callable[[Lookup, str], list[Condition]]:
    return lambda lookup, base: [
        _accuracy_difference(lookup, base, f"OPSD − {title}", f"opsd{suffix}", f"{arm}{suffix}", split)
        for title, arm in (("SFT", "sft"), ("off-policy", "off_policy"))
    ]


def _lost_by(lookup: Lookup, base: str, text: str, more: str, less: str) -> Condition:
    values = _values(lookup, base, more, less, lambda one, other: drop(one) - drop(other))
    return Condition(f"accuracy lost over 5 times the steps, {text}", values, 0.05)


def _mean_drop(lookup: Lookup, base: str, arm: str) -> float:
    return fmean([drop(result) for result in lookup(arm, base).values()] or [0.0])


def _fixed_is_more_stable(lookup: Lookup, base: str) -> list[Condition]:
    lost = _lost_by(lookup, base, "live − fixed", "opsd_live_long", "opsd_long")
    obstacle = None
    if max(_mean_drop(lookup, base, arm) for arm in ("opsd_long", "opsd_live_long")) < _SOMETHING:
        obstacle = "neither loses 10 points"
    elif any(
        best_accuracy(result) - result["curve"][0]["accuracy"] < 0.05 and drop(result) < _SOMETHING
        for result in lookup("opsd_live_long", base).values()
    ):
        obstacle = "with a live teacher nothing was learnt that could be lost"
    return [
        replace(lost, obstacle=obstacle),
        _accuracy_difference(lookup, base, "fixed − live in the end", "opsd_long", "opsd_live_long"),
    ]


def _clip_prevents_collapse(lookup: Lookup, base: str) -> list[Condition]:
    lost = _lost_by(lookup, base, "without − with the clip", "opsd_long", "opsd_clip_long")
    nothing = _mean_drop(lookup, base, "opsd_long") < _SOMETHING
    kept = [_SOMETHING - drop(result) for result in lookup("opsd_clip_long", base).values()]
    return [
        replace(lost, obstacle="less than 10 points are lost without the clip" if nothing else None),
        Condition("10 points less what is lost with the clip", kept, 0.0),
        _accuracy_difference(lookup, base, "with − without the clip in the end", "opsd_clip_long", "opsd_long"),
    ]


def _forward_kl_is_best(lookup: Lookup, base: str) -> list[Condition]:
    return [
        _accuracy_difference(lookup, base, f"forward KL − {title}", "opsd", arm)
        for title, arm in (("reverse KL", "opsd_reverse_kl"), ("JSD", "opsd_jsd"))
    ]


def _collapses(lookup: Lookup, base: str, title: str, arm: str) -> Condition:
    condition = _accuracy_difference(lookup, base, f"base − {title}", "base", arm, margin=0.1)
    tuned = ARMS[arm].tuned_as is None
    rates = {result["settings"]["run"]["learning_rate"] for result in lookup(arm, base).values()}
    at_end = tuned and rates <= {min(LEARNING_RATES)}
    return replace(condition, doubt="its best rate may lie below the grid" if at_end else None)


def _no_collapse(lookup: Lookup, base: str, title: str) -> Condition:
    condition = _accuracy_difference(lookup, base, f"{title} − base, plus 10 points", "opsdc_50", "base", margin=0.0)
    return replace(condition, values=[value + 0.1 for value in condition.values], obstacle=None)


def _forward_kl_collapses(arm: str) -> Callable[[Lookup, str], list[Condition]]:
    return lambda lookup, base: [
        _collapses(lookup, base, "forward KL", arm),
        _no_collapse(lookup, base, "reverse KL"),
        _accuracy_difference(lookup, base, "reverse − forward KL", "opsdc_50", arm),
    ]


def _refreshing_each_step_collapses(arm: str) -> Callable[[Lookup, str], list[Condition]]:
    return lambda lookup, base: [
        _collapses(lookup, base, "refreshed every step", arm),
        _accuracy_difference(lookup, base, "every 50 steps − every step", "opsdc_50", arm, margin=0.1),
    ]


def _too_little(reductions: Sequence[float]) -> str | None:
    return "answers become less than 10 points shorter" if reductions and fmean(reductions) < _SOMETHING else None


def _frozen_compresses_little(lookup: Lookup, base: str) -> list[Condition]:
    runs = _values(lookup, base, "opsdc_50", "opsdc_frozen", lambda one, other: (one, other))
    reference = next(iter(lookup("base", base).values()), None)
    pairs = (
        [] if reference is None else [(reduction(one, reference), reduction(other, reference)) for one, other in runs]
    )
    obstacle = _too_little([one for one, _ in pairs])
    return [
        Condition(
            "length reduction, refreshed every 50 steps − frozen",
            [one - other for one, other in pairs],
            0.05,
            obstacle=obstacle,
        ),
        Condition(
            "half of the former − the latter", [one / 2 - other for one, other in pairs], 0.0, obstacle=obstacle
        ),
    ]


def _is_adaptive(lookup: Lookup, base: str) -> list[Condition]:
    def by_size(result: Result, reference: Result) -> tuple[float, float]:
        sizes = sorted(reference["final"]["test"]["by_digits"], key=int)
        return reduction(result, reference, sizes[0]), reduction(result, reference, sizes[-1])

    pairs = _values(lookup, base, "opsdc_50", "base", by_size)
    # All seeds are compared with the same answers of the base, a third of the problems of each size
    left = [1 - fmean(side) for side in zip(*pairs, strict=True)]
    error = math.hypot(*left) * _LENGTH_SPREAD / math.sqrt(BASES[base].family.splits["test"].rows / 3)
    return [
        Condition(
            "length reduction, easiest − hardest",
            [easy - hard for easy, hard in pairs],
            0.02,
            error,
            _too_little([reduction for pair in pairs for reduction in pair]),
        )
    ]


def _rich_context_suppresses(lookup: Lookup, base: str) -> list[Condition]:
    return [
        Condition(
            f"markers per 1,000 tokens, {title} − OPSD",
            _values(lookup, base, arm, "opsd", lambda one, other: _markers(one) - _markers(other)),
            1.0,
            shown="{:+.1f}".format,
        )
        for title, arm in (("base", "base"), ("answer only", "opsd_answer"))
    ]


def _rich_context_hurts(split: str) -> Callable[[Lookup, str], list[Condition]]:
    return lambda lookup, base: [
        _accuracy_difference(lookup, base, f"{title} − OPSD", arm, "opsd", split)
        for title, arm in (("base", "base"), ("answer only", "opsd_answer"))
    ]


def _without_spread(result: Result) -> list[float]:
    """Share of groups without spread in each fifth of the steps."""
    return fifths(result["series"]["frac_reward_zero_std"])


def _groups_have_no_spread(lookup: Lookup, base: str) -> list[Condition]:
    values = [fmean(_without_spread(result)) - 0.5 for result in lookup("grpo", base).values()]
    return [Condition("share of groups without spread, above a half", values, 0.0)]


def _groups_lose_spread(lookup: Lookup, base: str) -> list[Condition]:
    shares = [_without_spread(result) for result in lookup("grpo", base).values()]
    return [
        Condition("share of groups without spread, last − first fifth", [one[-1] - one[0] for one in shares], 0.05)
    ]


@dataclass(frozen=True)
class Claim:
    """
    A published claim.

    Args:
        text (`str`):
            The claim.
        source (`str`):
            Number of its paper, as in `huggingface.co/papers/<number>`, or "ours".
        conditions (`Callable[[Lookup, str], list[Condition]]`):
            Its conditions on a base.
        bases (`tuple[str, ...]`):
            Names of the bases it is judged on.
    """

    text: str
    source: str
    conditions: Callable[[Lookup, str], list[Condition]]
    bases: tuple[str, ...] = field(default=("weak", "middling"))


_MIDDLING = ("middling",)
_OPSD, _OPSDC, _DEGRADES, _OURS = "2601.18734", "2603.05433", "2603.24472", "ours"

_SPLITS = (("held out", "test"), ("on longer sums", "longer"), ("in words", "words"))
_RATES = (("at the same learning rate", "_same"), ("each at its best learning rate", ""))

CLAIMS = (
    Claim("OPSD needs at least 4 times fewer generated tokens than GRPO for the same accuracy", _OPSD, _tokens),
    *(
        Claim(f"OPSD beats SFT and off-policy distillation on {solutions}, {where}", source, _beats(suffix, split))
        for solutions, source, suffix in (("terse solutions", _OPSD, "_terse"), ("worked solutions", _OURS, ""))
        for where, split in _SPLITS
    ),
    Claim("A fixed teacher is more stable than a live one", _OPSD, _fixed_is_more_stable, _MIDDLING),
    Claim("The clip prevents collapse", _OPSD, _clip_prevents_collapse, _MIDDLING),
    Claim("Forward KL is best for OPSD", _OPSD, _forward_kl_is_best, _MIDDLING),
    *(
        Claim(f"{text}, {rate}", _OPSDC, conditions(f"{arm}{suffix}"), ("verbose",))
        for text, conditions, arm in (
            ("Forward KL collapses in OPSDC, reverse KL does not", _forward_kl_collapses, "opsdc_forward_kl"),
            ("Refreshing the teacher every step collapses", _refreshing_each_step_collapses, "opsdc_1"),
        )
        for rate, suffix in _RATES
    ),
    Claim("Never refreshing the teacher compresses little", _OPSDC, _frozen_compresses_little, ("verbose",)),
    Claim("Compression is adaptive: easy problems shrink more than hard ones", _OPSDC, _is_adaptive, ("verbose",)),
    Claim("Rich context suppresses expressions of uncertainty", _DEGRADES, _rich_context_suppresses, _MIDDLING),
    *(
        Claim(f"Rich context hurts out of domain, {where}", _DEGRADES, _rich_context_hurts(split), _MIDDLING)
        for where, split in _SPLITS[1:]
    ),
    Claim("Most of GRPO's groups have no spread of rewards", _OPSD, _groups_have_no_spread),
    Claim("GRPO's groups lose their spread of rewards as it trains", _OPSD, _groups_lose_spread),
)


def verdicts(lookup: Lookup, bases: Sequence[str]) -> list[Verdict]:
    """
    Judges all claims.

    Args:
        lookup (`Callable[[str, str], dict[int, Result]]`):
            Gives the complete results of an arm on a base, by seed, and those of the base itself for `"base"`.
        bases (`Sequence[str]`):
            Names of the bases that were to be run.

    Returns:
        `list[Verdict]`:
            One per claim and base.
    """
    found = []
    for claim in CLAIMS:
        for base in claim.bases:
            conditions = claim.conditions(lookup, base)
            outcome = judge(conditions) if base in bases else NOT_RUN
            found.append(Verdict(claim.text, claim.source, base, outcome, conditions))
    return found
