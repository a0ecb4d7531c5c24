import dataclasses

import numpy as np
import pytest
from eval.made import make_run, make_sample

from trl_opsd.eval.compare import ProblemChange, compare
from trl_opsd.eval.metrics import SampleTable, summarize_table
from trl_opsd.eval.statistics import paired_difference


def simulated(num_problems, k, shift, seed, scale=1.0):
    """Abilities and lengths belong to the problems, luck to the seed."""
    problems = np.random.default_rng(99)
    ability, length = problems.normal(0, 1.5, num_problems), problems.lognormal(6, 0.5, num_problems)
    luck = np.random.default_rng(seed)
    return [
        make_sample(
            f"p{i:03d}",
            j,
            bool(luck.random() < 1 / (1 + np.exp(-ability[i] - shift))),
            num_tokens=1 + int(scale * length[i] * luck.lognormal(0, 0.3)),
        )
        for i in range(num_problems)
        for j in range(k)
    ]


def test_differences():
    base = make_run([True, True, False, False], [False] * 4, [True] * 4, num_tokens=100, completion="wait, unlikely")
    new = make_run([True] * 4, [False] * 4, [True, True, True, False], num_tokens=80, completion="check")
    new[0] = dataclasses.replace(new[0], terminated=False)
    comparison = compare(base, new)
    assert comparison.changes == [
        ProblemChange("p000", 0.5, 1.0, "improved"),
        ProblemChange("p001", 0.0, 0.0, "same"),
        ProblemChange("p002", 1.0, 0.75, "worse"),
    ]
    assert comparison.accuracy_difference == paired_difference(np.array([0.5, 0, -0.25]), 1 / 4)
    assert comparison.truncation_difference == paired_difference(np.array([0.25, 0, 0]), 1 / 4)
    assert comparison.length_reduction.value == pytest.approx(0.2)
    assert comparison.marker_substrings_difference.value == pytest.approx(1 - 2)
    assert comparison.marker_words_per_1k_tokens_difference.value == pytest.approx(1000 / 80 - 1000 / 100)
    assert comparison.p_value == 1.0
    assert comparison.num_left_out == 0
    assert comparison.accuracy_verdict.startswith("Accuracy: no detectable difference, +8.3 points [")
    budgets = comparison.base.accuracy_at_budget.keys()
    assert list(budgets) == list(comparison.new.accuracy_at_budget) == [64, 100]
    assert comparison.new == summarize_table(SampleTable(new), list(budgets))


def test_both_runs_have_the_same_budgets():
    comparison = compare(make_run([True], num_tokens=100), make_run([True], num_tokens=300))
    for summary in (comparison.base, comparison.new):
        assert list(summary.accuracy_at_budget) == [64, 128, 256, 300]


def test_no_difference():
    comparison = compare(simulated(100, 4, 0, seed=1), simulated(100, 4, 0, seed=2))
    difference = comparison.accuracy_difference
    assert comparison.accuracy_verdict == (
        f"Accuracy: no detectable difference, {100 * difference.value:+.1f} points "
        f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]."
    )
    assert comparison.length_verdict.startswith("Length: no detectable difference, ")
    assert comparison.p_value > 0.05


def test_better_and_shorter():
    base, new = simulated(100, 4, 0, seed=0), simulated(100, 4, 0.8, seed=1, scale=0.6)
    comparison = compare(base, new)
    difference, length = comparison.accuracy_difference, comparison.length_reduction
    assert comparison.accuracy_verdict == (
        f"Accuracy: higher by {100 * difference.value:.1f} points "
        f"[{100 * difference.low:.1f}, {100 * difference.high:.1f}]."
    )
    assert 0 < difference.low < difference.value < difference.high
    assert comparison.p_value < 0.01
    assert length.low < 0.4 < length.high
    assert comparison.length_verdict.startswith("Length: shorter by ")

    turned = compare(new, base)
    assert turned.accuracy_verdict == (
        f"Accuracy: lower by {100 * difference.value:.1f} points "
        f"[{100 * difference.low:.1f}, {100 * difference.high:.1f}]."
    )
    assert turned.length_verdict.startswith("Length: longer by ")
    assert turned.length_reduction.high < 0


def test_pairing_narrows_the_interval():
    base, new = simulated(100, 8, 0, seed=0), simulated(100, 8, 0.3, seed=1)
    comparison = compare(base, new)
    single = comparison.base.avg_at_k
    difference = comparison.accuracy_difference
    assert difference.high - difference.low < 0.75 * (single.high - single.low)
    length, tokens = comparison.length_reduction, comparison.base.mean_tokens
    assert length.high - length.low < 0.6 * (tokens.high - tokens.low) / tokens.value


def test_other_number_of_samples():
    comparison = compare(make_run([True, False], [False, False]), make_run([True] * 8, [False] * 8))
    assert comparison.accuracy_difference == paired_difference(np.array([0.5, 0.0]), 1 / 2)


@pytest.mark.parametrize("shift", [0, 0.7])
def test_coverage(shift):
    """The interval holds the difference in the population of problems."""
    generator = np.random.default_rng(0)

    def accuracies(ability):
        return 1 / (1 + np.exp(-ability)), 1 / (1 + np.exp(-ability - shift))

    before, after = accuracies(generator.normal(0, 2, 10**6))
    truth = np.mean(after - before)
    inside = 0
    for _ in range(1000):
        base, new = (generator.binomial(12, share) / 12 for share in accuracies(generator.normal(0, 2, 30)))
        estimate = paired_difference(new - base, 1 / 12)
        inside += estimate.low <= truth <= estimate.high
    assert 935 <= inside <= 980


# Little to go by


def test_all_right_in_both_runs():
    comparison = compare(make_run(*[[True] * 4] * 20), make_run(*[[True] * 4] * 20))
    assert comparison.accuracy_difference.low < -0.05
    assert comparison.accuracy_difference.high > 0.05
    assert comparison.accuracy_verdict.startswith("Accuracy: no detectable difference, +0.0 points [-")
    assert comparison.length_verdict == "Length: no detectable difference, all problems are alike."
    assert comparison.p_value == 1.0


@pytest.mark.parametrize(("tokens", "word"), [(5, "shorter by 50.0 %"), (15, "longer by 50.0 %")])
def test_single_problem(tokens, word):
    comparison = compare(make_run([False] * 4), make_run([True] * 4, num_tokens=tokens))
    assert comparison.accuracy_verdict == "Accuracy: no detectable difference, +100.0 points [-100.0, +100.0]."
    assert comparison.length_verdict.startswith(f"Length: {word} here, but one problem")


def test_nothing_graded():
    comparison = compare(make_run([None]), make_run([None]))
    assert comparison.accuracy_difference is comparison.p_value is None
    assert comparison.changes == []
    assert comparison.accuracy_verdict == "Accuracy: no problem could be graded."


# Runs that do not match


def test_problems_of_one_run_only():
    base = [make_sample(name) for name in "abc"]
    new = [make_sample(name) for name in "bcde"]
    with pytest.raises(ValueError, match=r"only the base run has a; only the new run has d, e\. .*--common_only"):
        compare(base, new)
    comparison = compare(base, new, common_only=True)
    assert [change.problem_id for change in comparison.changes] == ["b", "c"]
    assert (comparison.num_problems, comparison.num_left_out) == (2, 3)
    assert comparison.base.num_samples == comparison.new.num_samples == 2


def test_many_problems_of_one_run_only():
    base = [make_sample(f"p{i:02}") for i in range(14)]
    with pytest.raises(ValueError, match=r"base run has p02, .*p11 and 2 more\. "):
        compare(base, base[:2])


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ([make_sample("other")], "no problem in common"),
        ([], "no problem|no samples|only the base run"),
        ([make_sample(benchmark="other")], "different benchmarks, 'made-up' and 'other'"),
        ([make_sample(reference="8")], "reference answer '7' in the base run and '8' in the new run"),
        ([make_sample(correct=None)], "Only one run has verdicts for p0. Grade both"),
    ],
)
def test_runs_that_do_not_match(new, message):
    with pytest.raises(ValueError, match=message):
        compare([make_sample()], new)
