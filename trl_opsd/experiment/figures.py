"""Figures read off the results of runs, and their spread over the seeds."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from ..eval.statistics import student_t


# What a run left, see `run`
Result = dict[str, Any]


def interval(values: Sequence[float], error: float = 0.0) -> tuple[float, float, float]:
    """
    The mean over the seeds with its 95 % interval, Student's t.

    Args:
        values (`Sequence[float]`):
            One per seed, at least two.
        error (`float`, *optional*, defaults to `0.0`):
            Standard error of the mean that more seeds would not lessen.

    Returns:
        `tuple[float, float, float]`:
            Mean and ends of the interval.
    """
    mean = fmean(values)
    half = math.hypot(student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values)), 1.96 * error)
    return mean, mean - half, mean + half


def with_interval(values: Sequence[float], error: float = 0.0, scale: float = 1.0, form: str = "{:.1f}") -> str:
    """The mean over the seeds ± half of its 95 % interval, which takes two of them."""
    if not values:
        return "–"
    scaled = [scale * value for value in values]
    if len(scaled) == 1:
        return form.format(scaled[0])
    mean, low, _ = interval(scaled, scale * error)
    return f"{form.format(mean)} ± {form.format(mean - low)}"


def spread(values: Sequence[float | None], form: str = "{:.1f}", scale: float = 1.0) -> str:
    """Mean ± standard deviation, and how many of the seeds it is about if not all have a value."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return "–" if not values else "never"
    deviation = f" ± {form.replace('+', '').format(stdev(known))}" if len(known) > 1 else ""
    shown = form.format(fmean(known)) + deviation
    return shown if len(known) == len(values) else f"{shown} ({len(known)} of {len(values)})"


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
