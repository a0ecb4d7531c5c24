from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_opsd.eval.statistics import Estimate, bootstrap, paired_difference, proportion, sign_flip_p_value, student_t


def ends(estimate):
    return [estimate.low, estimate.high]


@pytest.mark.parametrize(
    ("degrees", "quantile", "tolerance"),
    [
        (1, 12.7062, 1e-4),
        (2, 4.3027, 1e-4),
        (3, 3.1824, 0.03),
        (5, 2.5706, 3e-3),
        (10, 2.2281, 2e-4),
        (29, 2.0452, 1e-4),
    ],
)
def test_student_t(degrees, quantile, tolerance):
    assert student_t(degrees) == pytest.approx(quantile, abs=tolerance)


def test_student_t_becomes_normal():
    assert student_t(10**9) == pytest.approx(1.959964, abs=1e-6)


# Proportions


@pytest.mark.parametrize(
    ("successes", "trials", "interval"),
    # From the closed form with z = 1.959964, worked out apart.
    [
        (7, 10, [0.396778, 0.892209]),
        (0, 10, [0.0, 0.277533]),
        (30, 30, [30 / 33.841459, 1.0]),
        (1, 1, [0.206549, 1.0]),
    ],
)
def test_plain_proportions_have_wilsons_interval(successes, trials, interval):
    values = np.array([1.0] * successes + [0.0] * (trials - successes))
    estimate = proportion(values, np.ones(trials), trials)
    assert estimate.value == successes / trials
    assert ends(estimate) == pytest.approx(interval, abs=1e-6)


def test_effective_sample_size():
    """Variance 0.02 / 3 of the mean of 0.3, 0.5, 0.7 is that of 0.25 / (0.04 / 3) = 18.75 trials; t with 2 degrees."""
    estimate = proportion(np.array([0.3, 0.5, 0.7]), np.ones(3), 30)
    n, z = 0.25 / (0.04 / 3), 4.3027
    margin = z / (1 + z**2 / n) * (0.25 / n + z**2 / (4 * n**2)) ** 0.5
    assert estimate.value == pytest.approx(0.5)
    assert ends(estimate) == pytest.approx([0.5 - margin, 0.5 + margin])


def test_samples_bound_the_effective_sample_size():
    alike = proportion(np.array([0.5, 0.5, 0.5]), np.ones(3), 6)
    z = 4.3027
    margin = z / (1 + z**2 / 6) * (0.25 / 6 + z**2 / 144) ** 0.5
    assert ends(alike) == pytest.approx([0.5 - margin, 0.5 + margin])
    nearly = proportion(np.array([0.5, 0.5, 0.5 + 1e-6]), np.ones(3), 6)
    assert ends(nearly) == pytest.approx(ends(alike), abs=1e-5)


def test_ratio():
    """9 of 12 trials, in problems of 2, 4 and 6; the fourth has none."""
    numerators, denominators = np.array([2.0, 4.0, 3.0, 0.0]), np.array([2.0, 4.0, 6.0, 0.0])
    estimate = proportion(numerators, denominators, 12)
    variance = np.var((numerators - 0.75 * denominators)[:3] / 4, ddof=1) / 3
    n, z = 0.1875 / variance, 4.3027
    center, margin = (
        (0.75 + z**2 / (2 * n)) / (1 + z**2 / n),
        z / (1 + z**2 / n) * (0.1875 / n + z**2 / (4 * n**2)) ** 0.5,
    )
    assert estimate.value == 0.75
    assert ends(estimate) == pytest.approx([center - margin, center + margin])
    assert proportion(np.zeros(2), np.zeros(2), 0) is None


def test_all_right_counts_problems_not_samples():
    estimate = proportion(np.array([4.0] * 10), np.array([4.0] * 10), 40)
    assert ends(estimate) == pytest.approx([0.722467, 1.0], abs=1e-6)


def test_single_problem():
    estimate = proportion(np.array([0.5]), np.ones(1), 12)
    assert ends(estimate) == pytest.approx([0.054621, 0.945379], abs=1e-6)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_proportions_stay_inside(successes):
    estimate = proportion(np.array(successes) / 4, np.ones(len(successes)), 4 * len(successes))
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.high - estimate.low > 0
    mirrored = proportion(1 - np.array(successes) / 4, np.ones(len(successes)), 4 * len(successes))
    assert ends(mirrored) == pytest.approx([1 - estimate.high, 1 - estimate.low])


# Differences


def test_paired_difference_of_single_samples():
    """Bonett and Price: 6 better and 2 worse of 20, with 7 and 3 of 22."""
    differences = np.array([1.0] * 6 + [-1.0] * 2 + [0.0] * 12)
    estimate = paired_difference(differences, 1.0)
    margin = 2.0796 * (((7 + 3) / 22 - (4 / 22) ** 2) / 21) ** 0.5
    assert estimate.value == pytest.approx(0.2)
    assert ends(estimate) == pytest.approx([4 / 22 - margin, 4 / 22 + margin], abs=1e-4)


def test_paired_difference_of_many_samples_is_a_t_interval():
    differences = np.random.default_rng(0).normal(0.1, 0.2, size=400)
    estimate = paired_difference(differences, 1 / 16)
    margin = 1.966 * differences.std(ddof=1) / 20
    assert ends(estimate) == pytest.approx([estimate.value - margin, estimate.value + margin], abs=1e-3)


def test_made_up_problems_vary_like_the_others():
    """Three problems with standard deviation 0.2, and two more at ±0.2, or at ±0.5 where that is one sample."""
    differences = np.array([0.1, 0.3, 0.5])
    for step, reach in ((1 / 12, 0.2), (1 / 2, 0.5)):
        smoothed = np.array([0.1, 0.3, 0.5, reach, -reach])
        margin = 2.7765 * smoothed.std(ddof=1) / 5**0.5
        estimate = paired_difference(differences, step)
        assert estimate.value == pytest.approx(0.3)
        assert ends(estimate) == pytest.approx([0.18 - margin, 0.18 + margin], abs=0.002)


def test_changes_that_are_alike_but_for_rounding_are_alike():
    assert ends(paired_difference(np.array([0.3 - 0.1, 0.4 - 0.2]), 0.1)) == pytest.approx(
        ends(paired_difference(np.array([0.2, 0.2]), 0.1))
    )


def test_no_change_is_not_certainty():
    estimate = paired_difference(np.zeros(30), 1 / 12)
    assert estimate.value == 0
    assert estimate.high == pytest.approx(-estimate.low)
    # As one problem better and one worse would.
    assert estimate.high == pytest.approx(student_t(31) * (2 / 31 / 32) ** 0.5)
    assert ends(paired_difference(np.ones(1), 1.0)) == [-1, 1]


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=30))
def test_differences_stay_inside(steps):
    estimate = paired_difference(np.array(steps) / 4, 1 / 4)
    assert -1 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.low < estimate.high
    turned = paired_difference(-np.array(steps) / 4, 1 / 4)
    assert ends(turned) == pytest.approx([-estimate.high, -estimate.low])


# Bootstrap


def mean_of(values):
    return lambda weights: (weights @ values / weights.sum(axis=1))[:, None]


def test_bootstrap_of_a_mean():
    """Close to the t interval, which the plain percentiles fall short of by 6 % for 20 problems."""
    values = np.random.default_rng(1).normal(100, 10, size=20)
    [estimate] = bootstrap(20, mean_of(values))
    width = 2 * student_t(19) * values.std(ddof=1) / 20**0.5
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.high - estimate.low == pytest.approx(width, rel=0.03)
    assert estimate.low < estimate.value < estimate.high


def test_bootstrap_is_seeded_and_resamples_problems():
    values = np.arange(10.0)
    seen = []

    def statistic(weights):
        seen.append(weights)
        return mean_of(values)(weights)

    assert bootstrap(10, statistic) == bootstrap(10, mean_of(values))
    assert bootstrap(10, mean_of(values)) != bootstrap(10, mean_of(values), seed=1)
    assert seen[0].tolist() == [[1.0] * 10]
    weights = np.concatenate(seen[1:])
    assert weights.shape == (10_000, 10)
    assert set(weights.sum(axis=1)) == {10}
    assert weights.mean(axis=0) == pytest.approx(np.ones(10), abs=0.05)


def test_bootstrap_of_several_statistics():
    def both(weights):
        return np.concatenate([mean_of(np.arange(10.0))(weights), mean_of(np.full(10, 3.0))(weights)], axis=1)

    varying, constant = bootstrap(10, both)
    assert varying == bootstrap(10, mean_of(np.arange(10.0)))[0]
    assert constant == Estimate(3.0, None, None)


def test_bootstrap_of_a_single_problem():
    assert bootstrap(1, mean_of(np.array([4.0]))) == [Estimate(4.0, None, None)]


# Sign flips


@given(st.lists(st.integers(-3, 3), max_size=8))
def test_sign_flips_are_exact(steps):
    differences = np.array(steps, dtype=float) / 3
    observed = abs(sum(steps))
    flips = [
        abs(sum(s * d for s, d in zip(signs, steps, strict=True))) for signs in product((-1, 1), repeat=len(steps))
    ]
    assert sign_flip_p_value(differences) == pytest.approx(sum(flip >= observed for flip in flips) / len(flips))


def test_many_sign_flips():
    differences = np.array([1.0] * 15 + [-1.0] * 5 + [0.0] * 100)
    # Two-sided binomial test of 15 of 20.
    assert sign_flip_p_value(differences) == pytest.approx(0.0414, abs=0.008)
    assert sign_flip_p_value(np.ones(100)) == pytest.approx(1 / 10_001)


# Coverage


@pytest.mark.parametrize(
    ("num_problems", "k", "a", "b"),
    [(500, 1, 1.5, 0.3), (30, 12, 0.5, 0.5), (30, 12, 0.3, 1.5), (30, 8, 1.5, 0.3), (30, 1, 0.3, 1.5)],
)
def test_coverage_for_problems_like_these(num_problems, k, a, b):
    """The interval holds the mean of the population that the problems were drawn from."""
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        correct = generator.binomial(k, generator.beta(a, b, num_problems))
        low, high = ends(proportion(correct / k, np.ones(num_problems), k * num_problems))
        inside += low <= a / (a + b) <= high
    assert inside >= 935


@pytest.mark.parametrize(("num_problems", "k", "a", "b"), [(500, 4, 1.5, 0.3), (30, 12, 0.5, 0.5), (30, 1, 0.3, 1.5)])
def test_coverage_for_these_very_problems(num_problems, k, a, b):
    """A model with a known answer distribution: avg@k is inside its interval in at least 95 of 100 runs."""
    generator = np.random.default_rng(0)
    probabilities = generator.beta(a, b, num_problems)
    inside = 0
    for _ in range(1000):
        correct = generator.binomial(k, probabilities)
        low, high = ends(proportion(correct / k, np.ones(num_problems), k * num_problems))
        inside += low <= probabilities.mean() <= high
    assert inside >= 950
