"""
The published claims, and the rules that decide what the study says about them.

Every claim is a list of conditions, each a quantity with one value per seed that the claim says is positive. A
condition has a margin, the least value that would matter, and a 95 % t interval over the seeds.

- It is *met* if the interval lies above zero and the mean reaches the margin.
- It is *refuted* if the interval lies below the margin.
- Otherwise, or if what it rests on did not happen (both arms at the ceiling, GRPO that learnt nothing), it is *open*.

A claim holds here if all of its conditions are met, does not hold here if one is refuted, and cannot be seen here
otherwise. With a run missing that would be needed for two seeds, it was not run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from ..eval.statistics import student_t


HOLDS, FAILS, UNSEEN, NOT_RUN = "holds here", "does not hold here", "cannot be seen here", "not run"

Result = dict[str, Any]
Metric = Callable[[Result], float]
# The complete results of an arm on a base, by seed; the base itself is the arm "base".
Lookup = Callable[[str, str], dict[int, Result]]

_CEILING, _FLOOR = 0.97, 0.03


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
        obstacle (`str`, *optional*):
            Why it cannot be judged, whatever its values.
        percent (`bool`, *optional*, defaults to `True`):
            Whether it is shown in percent points.
    """

    text: str
    values: list[float]
    margin: float
    obstacle: str | None = None
    percent: bool = True

    def interval(self) -> tuple[float, float, float]:
        """Mean over the seeds, and the ends of its 95 % t interval."""
        mean = fmean(self.values)
        half = student_t(len(self.values) - 1) * stdev(self.values) / math.sqrt(len(self.values))
        return mean, mean - half, mean + half

    def state(self) -> str:
        """`"missing"`, `"open"`, `"met"` or `"refuted"`."""
        if len(self.values) < 2:
            return "missing"
        if self.obstacle is not None:
            return "open"
        mean, low, high = self.interval()
        if low > 0 and mean >= self.margin:
            return "met"
        return "refuted" if high < self.margin else "open"

    def __str__(self) -> str:
        if self.state() == "missing":
            return f"{self.text}: not run"
        scale = 100 if self.percent else 1
        mean, low, high = (scale * value for value in self.interval())
        shown = f"{self.text} {mean:+.1f} [{low:+.1f}, {high:+.1f}]"
        return f"{shown} ({self.state()}{'' if self.obstacle is None else f': {self.obstacle}'})"


@dataclass(frozen=True)
class Verdict:
    """
    What the study says about a claim on one base.

    Args:
        claim (`str`):
            The claim.
        base (`str`):
            Name of the base.
        outcome (`str`):
            `HOLDS`, `FAILS`, `UNSEEN` or `NOT_RUN`.
        conditions (`list[Condition]`):
            What it rests on.
    """

    claim: str
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


def accuracy(split: str) -> Metric:
    """Final accuracy on a split."""
    return lambda result: result["final"][split]["accuracy"]


def _out_of_domain(result: Result) -> float:
    return fmean(result["final"][split]["accuracy"] for split in ("longer", "words"))


def _markers(result: Result) -> float:
    return result["final"]["test"]["markers_per_1k"]


def tokens_to_reach(result: Result, target: float) -> float | None:
    """
    Generated tokens at the first point of a learning curve that reaches an accuracy.

    Args:
        result (`dict[str, Any]`):
            Result of a run.
        target (`float`):
            Accuracy.

    Returns:
        `float` or `None`:
            Tokens, `None` if the curve never gets there.
    """
    return next((point["generated_tokens"] for point in result["curve"] if point["accuracy"] >= target), None)


def fewest_tokens(results: Sequence[Result], target: float) -> float | None:
    """
    Generated tokens with which the first of several runs reaches an accuracy: one whose schedule ends sooner may get
    there sooner.

    Args:
        results (`Sequence[dict[str, Any]]`):
            Results of the runs.
        target (`float`):
            Accuracy.

    Returns:
        `float` or `None`:
            Tokens, `None` if none gets there.
    """
    needed = [tokens for result in results if (tokens := tokens_to_reach(result, target)) is not None]
    return min(needed, default=None)


def best_accuracy(result: Result) -> float:
    """Highest accuracy on a learning curve."""
    return max(point["accuracy"] for point in result["curve"])


def drop(result: Result) -> float:
    """
    Accuracy lost since the best of the learning curve, both taken as means of three neighbouring points, or of all if
    there are fewer.

    Args:
        result (`dict[str, Any]`):
            Result of a run.

    Returns:
        `float`:
            Accuracy that was lost.
    """
    curve = [point["accuracy"] for point in result["curve"]]
    width = min(3, len(curve))
    means = [fmean(curve[end - width : end]) for end in range(width, len(curve) + 1)]
    return max(means) - means[-1]


def reduction(result: Result, base: Result, digits: str | None = None) -> float:
    """
    Share of the base's length that is gone.

    Args:
        result (`dict[str, Any]`):
            Result of a run.
        base (`dict[str, Any]`):
            Result of its base.
        digits (`str`, *optional*):
            Number of digits of the problems. `None` takes all.

    Returns:
        `float`:
            Share of the tokens, negative if responses became longer.
    """
    lengths = [
        (value["final"]["test"] if digits is None else value["final"]["test"]["by_digits"][digits])["mean_tokens"]
        for value in (result, base)
    ]
    return 1 - lengths[0] / lengths[1]


# Conditions


def _difference(
    lookup: Lookup, base: str, text: str, better: str, worse: str, metric: Metric, margin: float, percent: bool = True
) -> Condition:
    first, second = lookup(better, base), lookup(worse, base)
    pairs = [(metric(first[seed]), metric(second[seed])) for seed in sorted(first.keys() & second.keys())]
    return Condition(text, [a - b for a, b in pairs], margin, percent=percent)


def _accuracy_difference(lookup: Lookup, base: str, text: str, better: str, worse: str, metric: Metric) -> Condition:
    condition = _difference(lookup, base, text, better, worse, metric, 0.02)
    means = [fmean(map(metric, results.values())) for arm in (better, worse) if (results := lookup(arm, base))]
    obstacle = None
    if means and min(means) > _CEILING:
        obstacle = "both at the ceiling"
    elif means and max(means) < _FLOOR:
        obstacle = "both at the floor"
    return replace(condition, obstacle=obstacle)


def _each(
    lookup: Lookup, base: str, text: str, arm: str, value: Callable[[Result, Result], float], margin: float
) -> Condition:
    results, bases = lookup(arm, base), lookup("base", base)
    return Condition(
        text, [value(results[seed], bases[seed]) for seed in sorted(results.keys() & bases.keys())], margin
    )


def _tokens(lookup: Lookup, base: str) -> list[Condition]:
    opsd, short, grpo = (lookup(arm, base) for arm in ("opsd", "opsd_short", "grpo"))
    reached, ratios, gains = [], [], []
    for seed in sorted(opsd.keys() & short.keys() & grpo.keys()):
        target = best_accuracy(grpo[seed])
        gains.append(target - grpo[seed]["curve"][0]["accuracy"])
        needed = fewest_tokens([opsd[seed], short[seed]], target)
        reference = tokens_to_reach(grpo[seed], target)
        assert reference is not None
        reached.append(-1.0 if needed is None else 1.0)
        # One that never gets there counts with all of its tokens here, and against the claim above
        least = opsd[seed]["generated_tokens"] if needed is None else needed
        ratios.append(math.log2(max(reference, 1) / max(least, 1)) - 2)
    obstacle = "GRPO's best is less than 5 points above the base" if gains and min(gains) < 0.05 else None
    return [
        Condition("OPSD reaches GRPO's best (+1) or not (−1)", reached, 0.5, obstacle, percent=False),
        Condition("log2 of (GRPO's tokens / OPSD's), less 2 for 4 times", ratios, 0.0, obstacle, percent=False),
    ]


def _beats(suffix: str, metric: Metric) -> Callable[[Lookup, str], list[Condition]]:
    return lambda lookup, base: [
        _accuracy_difference(lookup, base, f"OPSD − {title}", f"opsd{suffix}", f"{arm}{suffix}", metric)
        for title, arm in (("SFT", "sft"), ("off-policy", "off_policy"))
    ]


def _fixed_is_more_stable(lookup: Lookup, base: str) -> list[Condition]:
    text = "accuracy lost over 5 times the steps, live − fixed"
    return [_difference(lookup, base, text, "opsd_live_long", "opsd_long", drop, 0.05)]


def _clip_prevents_collapse(lookup: Lookup, base: str) -> list[Condition]:
    text = "accuracy lost over 5 times the steps, without − with the clip"
    condition = _difference(lookup, base, text, "opsd_long", "opsd_clip_long", drop, 0.05)
    lost = [drop(result) for result in lookup("opsd_long", base).values()]
    nothing = bool(lost) and fmean(lost) < 0.1
    return [replace(condition, obstacle="less than 10 points are lost without the clip" if nothing else None)]


def _forward_kl_is_best(lookup: Lookup, base: str) -> list[Condition]:
    return [
        _accuracy_difference(lookup, base, f"forward KL − {title}, held out", "opsd", arm, accuracy("test"))
        for title, arm in (("reverse KL", "opsd_reverse_kl"), ("JSD", "opsd_jsd"))
    ]


def _lost_accuracy(result: Result, base: Result) -> float:
    return base["final"]["test"]["accuracy"] - result["final"]["test"]["accuracy"]


def _forward_kl_collapses(lookup: Lookup, base: str) -> list[Condition]:
    forward = "opsdc_forward_kl_same"
    return [
        _each(lookup, base, "base − forward KL, accuracy", forward, _lost_accuracy, 0.1),
        _no_collapse(lookup, base, "10 points − (base − reverse KL), accuracy"),
        _accuracy_difference(lookup, base, "reverse − forward KL, accuracy", "opsdc_50", forward, accuracy("test")),
    ]


def _no_collapse(lookup: Lookup, base: str, text: str) -> Condition:
    return _each(lookup, base, text, "opsdc_50", lambda *results: 0.1 - _lost_accuracy(*results), 0.0)


def _refreshing_each_step_collapses(lookup: Lookup, base: str) -> list[Condition]:
    return [
        _each(lookup, base, "base − refreshed every step, accuracy", "opsdc_1_same", _lost_accuracy, 0.1),
        _no_collapse(lookup, base, "10 points − (base − every 50 steps), accuracy"),
    ]


def _frozen_compresses_little(lookup: Lookup, base: str) -> list[Condition]:
    bases = lookup("base", base)
    lengths, frozen = lookup("opsdc_50", base), lookup("opsdc_frozen", base)
    seeds = sorted(lengths.keys() & frozen.keys() & bases.keys())
    values = [reduction(lengths[seed], bases[seed]) - reduction(frozen[seed], bases[seed]) for seed in seeds]
    return [Condition("length reduction, refreshed every 50 steps − frozen", values, 0.05)]


def _is_adaptive(lookup: Lookup, base: str) -> list[Condition]:
    def easy_minus_hard(result: Result, reference: Result) -> float:
        levels = sorted(reference["final"]["test"]["by_digits"], key=int)
        return reduction(result, reference, levels[0]) - reduction(result, reference, levels[-1])

    return [_each(lookup, base, "length reduction, easiest − hardest", "opsdc_50", easy_minus_hard, 0.02)]


def _rich_context_suppresses(lookup: Lookup, base: str) -> list[Condition]:
    values = (
        ("markers per 1,000 tokens, base − OPSD", "base", "opsd"),
        ("markers per 1,000 tokens, answer only − OPSD", "opsd_answer", "opsd"),
    )
    return [_difference(lookup, base, text, more, fewer, _markers, 1.0, percent=False) for text, more, fewer in values]


def _rich_context_hurts(lookup: Lookup, base: str) -> list[Condition]:
    return [
        _accuracy_difference(lookup, base, f"{title} − OPSD, out of domain", arm, "opsd", _out_of_domain)
        for title, arm in (("base", "base"), ("answer only", "opsd_answer"))
    ]


def _groups_collapse(lookup: Lookup, base: str) -> list[Condition]:
    def excess(result: Result, _: Result) -> float:
        return fmean(result["series"]["frac_reward_zero_std"]) - 0.5

    return [_each(lookup, base, "share of groups without spread, above a half", "grpo", excess, 0.0)]


@dataclass(frozen=True)
class Claim:
    """
    A published claim.

    Args:
        text (`str`):
            The claim.
        source (`str`):
            Paper, as `huggingface.co/papers/<id>`.
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
_OPSD, _OPSDC, _DEGRADES = (f"huggingface.co/papers/{number}" for number in ("2601.18734", "2603.05433", "2603.24472"))

CLAIMS = (
    Claim("OPSD needs at least 4 times fewer generated tokens than GRPO for the same accuracy", _OPSD, _tokens),
    *(
        Claim(f"OPSD beats SFT and off-policy distillation on {solutions}, {where}", _OPSD, _beats(suffix, metric))
        for solutions, suffix in (("terse solutions", "_terse"), ("worked solutions", ""))
        for where, metric in (("held out", accuracy("test")), ("out of domain", _out_of_domain))
    ),
    Claim("A fixed teacher is more stable than a live one", _OPSD, _fixed_is_more_stable, _MIDDLING),
    Claim("The clip prevents collapse", _OPSD, _clip_prevents_collapse, _MIDDLING),
    Claim("Forward KL is best for OPSD", _OPSD, _forward_kl_is_best, _MIDDLING),
    Claim("Forward KL collapses in OPSDC, reverse KL does not", _OPSDC, _forward_kl_collapses, ("verbose",)),
    Claim("Refreshing the teacher every step collapses", _OPSDC, _refreshing_each_step_collapses, ("verbose",)),
    Claim("Never refreshing the teacher compresses little", _OPSDC, _frozen_compresses_little, ("verbose",)),
    Claim("Compression is adaptive: easy problems shrink more than hard ones", _OPSDC, _is_adaptive, ("verbose",)),
    Claim("Rich context suppresses expressions of uncertainty", _DEGRADES, _rich_context_suppresses, _MIDDLING),
    Claim("Rich context hurts out of domain", _DEGRADES, _rich_context_hurts, _MIDDLING),
    Claim("GRPO's groups collapse to zero reward spread", _OPSD, _groups_collapse),
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
            found.append(Verdict(claim.text, base, outcome, conditions))
    return found
