"""
Estimates with 95 % intervals.

Problems are the unit throughout: they are taken as drawn from a population of such problems, and the samples of one
problem stand or fall together. An interval says where the figure would be on all problems like these, with as many
samples each. It is wider than one for these very problems, where only the sampling is left to chance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt


Array = npt.NDArray[np.float64]

_Z = NormalDist().inv_cdf(0.975)
_RESAMPLES = 10_000
# Resamples held in memory at a time.
_BLOCK = 250


@dataclass(frozen=True)
class Estimate:
    """
    An estimate with its 95 % interval.

    Args:
        value (`float`):
            The estimate.
        low (`float`, *optional*):
            Lower end of the interval. `None` when the data say nothing about it.
        high (`float`, *optional*):
            Upper end.
    """

    value: float
    low: float | None
    high: float | None


def student_t(degrees_of_freedom: int) -> float:
    """
    The 97.5 % quantile of Student's t distribution, from its expansion around the normal quantile.

    Args:
        degrees_of_freedom (`int`):
            At least 1.

    Returns:
        `float`:
            The quantile, at most 1 % too small for 3 degrees of freedom and exact to four digits from 10.
    """
    exact = {1: 12.7062, 2: 4.3027}
    if degrees_of_freedom in exact:
        return exact[degrees_of_freedom]
    z, n = _Z, degrees_of_freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def proportion(numerators: Array, denominators: Array, num_samples: int) -> Estimate | None:
    """
    A proportion, Σ numerators / Σ denominators over problems, with Wilson's interval at the effective sample size.

    Where each problem is one trial, that is Wilson's interval itself. Elsewhere, the effective sample size is that of
    independent trials whose proportion would vary as much as this one does from problem to problem, and Student's t
    takes the place of the normal quantile, since that variance is itself estimated (Korn and Graubard, 1998; Franco et
    al., 2019).

    Args:
        numerators (`np.ndarray`):
            Successes per problem.
        denominators (`np.ndarray`):
            Trials per problem. Both may be divided by any number, e.g. share of successes and 1. Problems without
            trials do not count.
        num_samples (`int`):
            Completions behind them, which the effective sample size does not exceed.

    Returns:
        [`Estimate`] or `None`:
            The proportion, between 0 and 1. `None` without any trial.
    """
    numerators, denominators = numerators[denominators > 0], denominators[denominators > 0]
    n = len(denominators)
    if n == 0:
        return None
    p = float(numerators.sum() / denominators.sum())
    residuals = (numerators - p * denominators) / denominators.mean()
    size, z = float(n), _Z
    is_plain = bool(np.all((numerators == 0) | (numerators == 1)) and np.all(denominators == 1))
    # Alike in all problems, none or all of them: there are no more independent trials than problems.
    if n > 1 and not is_plain and 0 < p < 1:
        variance = float(residuals.var(ddof=1)) / n
        size = min(p * (1 - p) / variance, num_samples) if variance > 0 else num_samples
        z = student_t(n - 1)
    center = (p + z**2 / (2 * size)) / (1 + z**2 / size)
    margin = z / (1 + z**2 / size) * (p * (1 - p) / size + z**2 / (4 * size**2)) ** 0.5
    # At 0 and 1 the two are equal up to rounding.
    return Estimate(p, max(0.0, min(p, center - margin)), min(1.0, max(p, center + margin)))


def paired_difference(differences: Array, step: float) -> Estimate:
    """
    A mean of differences in [−1, 1], one per problem, with the t interval over these and two made-up problems, one
    better and one worse by the standard deviation of the differences, or by `step` if that is more.

    For one sample per problem this is the interval of Bonett and Price (2012), with t for the normal quantile. The two
    problems keep it from shrinking to nothing where hardly any problem changed.

    Args:
        differences (`np.ndarray`):
            New minus base per problem.
        step (`float`):
            Least change of one problem, 1 / k.

    Returns:
        [`Estimate`]:
            The mean difference.
    """
    # Problems that all change alike do not tell how differently others might: take the largest step.
    step = 1.0 if np.ptp(differences) < 1e-9 else max(step, float(differences.std(ddof=1)))
    smoothed = np.append(differences, [step, -step])
    margin = student_t(len(smoothed) - 1) * float(smoothed.std(ddof=1)) / len(smoothed) ** 0.5
    center = float(smoothed.mean())
    return Estimate(float(differences.mean()), max(-1.0, center - margin), min(1.0, center + margin))


def bootstrap(num_problems: int, statistic: Callable[[Array], Array], seed: int = 0) -> list[Estimate]:
    """
    Statistics of all problems with the percentile interval of 10,000 resamples of problems.

    The percentiles are moved out as far as Student's t is from the normal distribution, and for the factor
    n / (n − 1) of the variance, without which the interval is too narrow for few problems (Hesterberg, 2015).

    Args:
        num_problems (`int`):
            Number of problems n.
        statistic (`Callable[[np.ndarray], np.ndarray]`):
            Maps weights of shape (resamples, n), how often each problem was drawn, to values of shape (resamples,
            statistics).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        `list[Estimate]`:
            One per statistic, without an interval for a single problem, or where all resamples give the same.
    """
    n = num_problems
    values = statistic(np.ones((1, n)))[0]
    if n == 1:
        return [Estimate(float(value), None, None) for value in values]
    generator = np.random.default_rng(seed)
    blocks = []
    for _ in range(_RESAMPLES // _BLOCK):
        draws = generator.integers(n, size=(_BLOCK, n)) + n * np.arange(_BLOCK)[:, None]
        weights = np.bincount(draws.ravel(), minlength=_BLOCK * n).reshape(_BLOCK, n)
        blocks.append(statistic(weights.astype(np.float64)))
    resampled = np.concatenate(blocks)
    tail = NormalDist().cdf(-((n / (n - 1)) ** 0.5) * student_t(n - 1))
    lows, highs = np.quantile(resampled, [tail, 1 - tail], axis=0)
    varies = np.ptp(resampled, axis=0) > 1e-12 * np.abs(values)
    return [
        Estimate(float(value), float(low), float(high)) if spread else Estimate(float(value), None, None)
        for value, low, high, spread in zip(values, lows, highs, varies, strict=True)
    ]


def sign_flip_p_value(differences: Array, seed: int = 0) -> float:
    """
    Two-sided p-value of the hypothesis that each problem's difference could as well have had the other sign.

    Args:
        differences (`np.ndarray`):
            New minus base per problem.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random signs.

    Returns:
        `float`:
            Exact with up to 13 problems that changed, from 10,000 random signs otherwise.
    """
    changed = differences[differences != 0]
    # Equal sums may differ in the last digits.
    observed = abs(float(changed.sum())) - 1e-9
    if len(changed) <= 13:
        signs: npt.NDArray[Any] = np.array(list(product((-1, 1), repeat=len(changed))))
        return float(np.mean(np.abs(signs @ changed) >= observed))
    generator = np.random.default_rng(seed)
    count = 0
    for _ in range(_RESAMPLES // _BLOCK):
        signs = 2 * generator.integers(2, size=(_BLOCK, len(changed))) - 1
        count += int(np.sum(np.abs(signs @ changed) >= observed))
    return (1 + count) / (1 + _RESAMPLES)
