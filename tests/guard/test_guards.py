"""What guards make of streams of metrics: healthy, noisy, collapsing, broken."""

import inspect
import json
import math
import random

import numpy as np
import pytest

from trl_opsd.eval.statistics import proportion
from trl_opsd.guard import GUARDS, MetricGuard


METRIC_GUARDS = [name for name, its in GUARDS.items() if issubclass(its, MetricGuard)]


def trouble(guard, values, name=None):
    """The step at which a guard first sees trouble."""
    for step, value in enumerate(values, 1):
        guard.observe(step, {} if value is None else {name or guard.metric: value})
        if guard.has_trouble:
            return step
    return None


def noisy(mean, length, spread=0.2):
    return [mean * (1 + spread * random.uniform(-1, 1)) for _ in range(length)]


def outside(guard, first):
    """A value beyond each limit of a guard."""
    low, high = guard.limits(first)
    return [value for value in (low - 0.01, high + 0.01) if math.isfinite(value)]


@pytest.mark.parametrize("name", METRIC_GUARDS)
def test_what_stays_within_its_noise_is_no_trouble(name):
    assert trouble(GUARDS[name](), noisy(0.3, 500)) is None


@pytest.mark.parametrize("name", METRIC_GUARDS)
def test_what_leaves_the_limits_is_trouble(name):
    for value in outside(GUARDS[name](), 0.3):
        guard = GUARDS[name](baseline=4, window=3)
        assert trouble(guard, [0.3] * 10 + [value] * 5) == 12  # when most of the last three are
        assert (guard.since, guard.beyond) == (10, 1)
        side = "below" if value < 0.3 else "above"
        assert f"(`{guard.metric}`) was {value:.3g} in the last 3 measurements, {side} the limit of " in guard.seen
        assert f"; {'at best' if name == 'correct' else 'in the first 4'} it was 0.3." in guard.seen


@pytest.mark.parametrize("name", METRIC_GUARDS)
def test_single_outliers_are_no_trouble(name):
    for value in outside(GUARDS[name](), 0.3):
        assert trouble(GUARDS[name](), ([0.3] * 10 + [1000 * value]) * 20) is None


def test_slow_collapse_is_found_where_the_limit_is_crossed():
    values = [1.0] * 10 + [0.99**step for step in range(400)]
    first_below = next(step for step, value in enumerate(values, 1) if value < 0.5)
    guard = GUARDS["entropy"](low=0.5, high=None, window=5)
    assert trouble(guard, values) == first_below + 2
    assert guard.since == first_below - 2


def test_patience():
    guard = GUARDS["truncation"](baseline=1, window=1, patience=3)
    assert trouble(guard, [0.0, 0.9, 0.9, 0.0, 0.9, 0.9, 0.9]) == 7
    assert (guard.since, guard.beyond) == (5, 3)


def test_there_is_no_trouble_in_the_first_measurements():
    """However wild they are, and all after is held against their mean."""
    guard = GUARDS["length"](low=0.5, high=2.0, baseline=4, window=1)
    assert trouble(guard, [1.0, 1000.0, 1.0, 998.0, 499.0, 260.0, 251.0]) is None
    assert trouble(guard, [249.0]) == 1


def test_a_share_that_was_high_from_the_beginning_is_no_trouble():
    assert trouble(GUARDS["truncation"](), [0.9] * 100) is None


@pytest.mark.parametrize("gap", [None, math.nan], ids=["missing", "NaN"])
def test_what_is_not_measured_is_passed_over(gap):
    """It neither counts nor ends a row of measurements."""
    guard = GUARDS["truncation"](baseline=2, window=2)
    assert trouble(guard, [gap, 0.0, gap, 0.0, gap, 0.9, gap, gap, 0.9]) == 9
    assert guard.since == 6
    assert trouble(GUARDS["truncation"](), [gap] * 100) is None


def test_an_infinite_value_is_beyond_every_limit():
    assert trouble(GUARDS["divergence"](baseline=1, window=1), [1.0, math.inf]) == 2


def test_what_the_clip_takes_off_is_part_of_the_divergence():
    guard = GUARDS["divergence"](baseline=1, window=1, high=2.0)
    for step, mass in enumerate((0.1, 0.15, 0.4), 1):
        guard.observe(step, {"distillation_loss": -0.01, "clipped_mass": mass})
    assert guard.since == 3
    assert "was 0.39 in the last 1 measurements, above the limit of 0.18" in guard.seen


@pytest.mark.parametrize("name", ["divergence", "entropy"])
def test_multiples_of_a_mean_that_may_be_negative_are_no_limits(name):
    """As an estimate by sampled tokens may be, of a divergence that is nearly zero."""
    for first in ([-0.01] * 5, [0.02, 0.01, -0.005, 0.01, 0.02], [0.0] * 5):
        guard = GUARDS[name]()
        assert trouble(guard, first + [random.gauss(0.0, 0.02) for _ in range(500)] + [1.0] * 10) is None
        assert "are not all positive" in guard.blind
    guard = GUARDS[name]()
    assert trouble(guard, [0.1] * 5 + [-0.1, 0.1] * 20 + [9.0] * 5) is not None  # later ones may be
    assert not guard.blind


def test_what_is_right_is_held_against_the_best():
    guard = GUARDS["correct"](baseline=2, window=1, fall=0.15)
    assert trouble(guard, [0.2, 0.2, 0.5, 0.9, 0.8, 0.76, 0.74]) == 7
    assert "was 0.74 in the last 1 measurements, below the limit of 0.75; at best it was 0.9." in guard.seen


def test_trouble_that_ends_can_begin_again():
    guard = GUARDS["truncation"](baseline=1, window=1, patience=2)
    assert trouble(guard, [0.0, 0.9, 0.9]) == 3
    guard.observe(4, {guard.metric: 0.0})
    assert (guard.since, guard.beyond, guard.has_trouble) == (None, 0, False)
    guard.observe(5, {guard.metric: 0.9})
    assert guard.since == 5


def test_skipped_steps():
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    assert trouble(GUARDS["non_finite"](patience=3), values, "skipped_steps") == 7


class TestBenchmark:
    def see(self, guard, *values, margin=0.0, **others):
        for step, value in enumerate(values):
            ends = {"eval_aime24/avg@4_low": value - margin, "eval_aime24/avg@4_high": value + margin}
            assert guard.observe(50 * step, {"eval_aime24/avg@4": value, **ends, **others})
        return guard

    def test_a_fall_below_the_best_is_trouble(self):
        guard = self.see(GUARDS["benchmark"](), 0.3, 0.5, 0.46, 0.44, 0.44)
        assert (guard.has_trouble, guard.since) == (True, 150)
        assert "is 0.44, and was 0.5 at step 50" in guard.seen

    def test_a_fall_within_the_interval_of_the_difference_is_none(self):
        # 0.07 * sqrt(2) = 0.099, and 0.112 below the best of two before it
        assert self.see(GUARDS["benchmark"](patience=1), 0.5, 0.4, margin=0.07).has_trouble
        assert not self.see(GUARDS["benchmark"](patience=1), 0.5, 0.41, margin=0.07).has_trouble
        assert not self.see(GUARDS["benchmark"](patience=1), 0.5, 0.5, 0.4, margin=0.07).has_trouble
        assert self.see(GUARDS["benchmark"](patience=1), 0.5, 0.5, 0.38, margin=0.07).has_trouble

    @pytest.mark.parametrize(("draw", "most"), [(lambda rng: rng.random(100), 3), (lambda rng: 0.1, 12)])
    def test_luck_is_no_best(self, draw, most):
        """Thirty evaluations of a model that stays as it is, by one sample of each of 100 problems."""
        by_right = [proportion((np.arange(100) < right).astype(float), np.ones(100), 100) for right in range(101)]
        rng, stopped = np.random.default_rng(0), 0
        for _ in range(300):
            guard, chances, troubled = GUARDS["benchmark"](), draw(rng), False
            for step in range(30):
                its = by_right[(rng.random(100) < chances).sum()]
                bounds = {"eval_a/avg@1_low": its.low, "eval_a/avg@1_high": its.high}
                guard.observe(step, {"eval_a/avg@1": its.value, **bounds})
                troubled |= guard.has_trouble
            stopped += troubled
        assert stopped <= most

    def test_one_bad_evaluation_is_none(self):
        assert not self.see(GUARDS["benchmark"](), 0.5, 0.35, 0.5, 0.35, margin=0.07).has_trouble

    def test_a_loss_of_several_times_the_limit_counts_as_often(self):
        """Which is 0.099 at the second evaluation, and 0.112 at the third."""
        assert self.see(GUARDS["benchmark"](), 0.5, 0.3, margin=0.07).has_trouble
        assert self.see(GUARDS["benchmark"](patience=3), 0.5, 0.3, margin=0.07).beyond == 2
        assert self.see(GUARDS["benchmark"](patience=3), 0.5, 0.3, 0.38, margin=0.07).has_trouble

    def test_without_an_interval_a_large_loss_counts_once(self):
        guard = GUARDS["benchmark"](score="eval_reward")
        assert trouble(guard, [0.9, 0.1, 0.9, 0.1, 0.1], "eval_reward") == 5

    def test_several_benchmarks_are_one_mean(self):
        guard = self.see(GUARDS["benchmark"](), 0.1, 0.3, **{"eval_other/avg@1": 0.5, "eval_other/pass@8": 0.9})
        assert guard.scores == {0: 0.3, 50: 0.4}

    def test_another_score(self):
        guard = GUARDS["benchmark"](score="eval_reward", patience=1)
        assert not guard.observe(5, {"eval_aime24/avg@4": 0.9})
        assert trouble(guard, [0.9, 0.8], "eval_reward") == 2
        assert "`eval_reward` is 0.8" in guard.seen

    def test_training_logs_are_no_evaluation(self):
        assert not GUARDS["benchmark"]().observe(1, {"loss": 0.5, "eval_loss": 1.0, "entropy": 0.1})


@pytest.mark.parametrize("name", GUARDS)
@pytest.mark.parametrize("stop", range(1, 25, 4))
def test_goes_on_from_its_state(name, stop):
    make = GUARDS[name]
    key = {"non_finite": "skipped_steps", "benchmark": "eval_a/avg@1"}.get(name) or make.metric
    values = [random.choice([0.0, 1.0]) for _ in range(30)]
    whole, resumed = make(patience=2), make(patience=2)
    for step, value in enumerate(values, 1):
        whole.observe(step, {key: value})
        if step == stop:
            resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        elif step > stop:
            resumed.observe(step, {key: value})
    assert whole.state_dict() == resumed.state_dict()
    assert whole == resumed


@pytest.mark.parametrize(
    ("name", "kwargs", "match"),
    [
        ("entropy", {"action": "halt"}, "`action` must be one of"),
        ("entropy", {"patience": 0}, "`patience` must be at least 1"),
        ("entropy", {"baseline": 0}, "`baseline` must be at least 1"),
        ("entropy", {"window": 0}, "`window` must be at least 1"),
        ("entropy", {"low": 1.5}, r"`low` must be in \[0, 1\)"),
        ("length", {"high": 0.5}, "`high` must be above 1"),
        ("truncation", {"rise": 0}, r"`rise` must be in \(0, 1\]"),
        ("correct", {"fall": 0}, r"`fall` must be in \(0, 1\]"),
        ("teacher_gap", {"fall": 0}, "`fall` must be positive"),
        ("benchmark", {"drop": 0}, "`drop` must be positive"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(name, kwargs, match):
    with pytest.raises(ValueError, match=match):
        GUARDS[name](**kwargs)


def test_signatures_name_every_argument():
    for name, kind in GUARDS.items():
        parameters = inspect.signature(kind).parameters
        assert {"action", "patience"} <= parameters.keys(), name
        assert all(one.kind is one.KEYWORD_ONLY for one in parameters.values()), name
