import dataclasses
from itertools import combinations

import numpy as np
import pytest
from eval.made import make_run, make_sample
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_opsd.eval.metrics import (
    SampleTable,
    answer_key,
    majority_share,
    pass_at_k,
    summarize,
    summarize_table,
    token_budgets,
)
from trl_opsd.eval.statistics import Estimate, proportion


# pass@k


@given(st.integers(1, 7), st.data())
def test_pass_at_k_enumerated(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@given(st.integers(1, 200), st.data())
def test_pass_at_k_grows(n, data):
    c = data.draw(st.integers(0, n))
    values = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(c / n)
    assert values[-1] == (c > 0)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_k_samples(k):
    with pytest.raises(ValueError, match=f"pass@{k} needs"):
        pass_at_k(4, 2, k)


# Majority


@pytest.mark.parametrize(
    ("votes", "share"),
    [
        ("7r 7r 8w", 1),
        ("7r 8w 8w", 0),
        ("7r 8w", 1 / 2),
        ("7r 8w 9w", 1 / 3),
        ("7r 7r 8w 8w 9w", 1 / 2),
        ("7r - - -", 1),
        ("8w 8w 7r 7.0r 14/2r", 1),
        ("-", 0),
        ("- -", 0),
        ("", 0),
    ],
)
def test_majority_share(votes, share):
    samples = [
        make_sample(sample_index=index, correct=vote[-1] == "r", answer=None if vote == "-" else vote[:-1])
        for index, vote in enumerate(votes.split())
    ]
    assert majority_share(samples) == pytest.approx(share)


def test_one_vote_with_two_verdicts():
    """The scorer may take an answer in one format and not in another."""
    samples = [make_sample(correct=correct, answer="7") for correct in (True, True, False)]
    assert majority_share(samples) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "group",
    [
        ["1/2", "0.5", " .5 ", "$\\frac{1}{2}$", "\\dfrac{1}{2}", "\\tfrac{2}{4}", "0.50"],
        ["-\\frac{3}{4}", "-0.75", "-3/4"],
        ["1,234,567", "1234567", "1234567.0", "1{,}234{,}567"],
        ["5", "5 \\text{ cm}", "x = 5", "\\frac{10}{2}", "\\$5", "5^\\circ", "5°"],
        ["50\\%", "50%"],
        ["2\\sqrt{3}", "2\\sqrt3", "2√3"],
        ["\\frac12", "\\frac{1}{2}"],
        ["(1, 2)", "(1,2)", "\\left(1,\\, 2\\right)"],
        ["Paris", "paris.", "\\text{Paris}"],
        ["x^2+1", "x^2 + 1"],
        ["\\frac{\\pi}{2}", "\\dfrac{\\pi}{2}"],
    ],
)
def test_one_vote(group):
    assert len({answer_key(answer) for answer in group}) == 1


def test_different_votes():
    answers = ["1", "-1", "12", "1.2", "1,2", "(1,2)", "1/2", "2/1", "\\pi/2", "x", "1/0", "1e999999999", "", "1.2.3"]
    assert len({answer_key(answer) for answer in answers}) == len(answers)


# Summaries


def test_accuracies():
    summary = summarize(make_run([True, True, True, False], [True, False, False, False], [False] * 4))
    assert (summary.num_problems, summary.num_samples, summary.samples_per_problem) == (3, 12, (4, 4))
    assert summary.avg_at_k == proportion(np.array([3, 1, 0]) / 4, np.ones(3), 12)
    assert {k: estimate.value for k, estimate in summary.pass_at_k.items()} == {
        1: pytest.approx(1 / 3),
        2: pytest.approx((1 + 1 / 2 + 0) / 3),
        4: pytest.approx(2 / 3),
    }
    assert summary.majority_at_k.value == pytest.approx(1 / 3)


def test_pass_at_k_ends_with_all_samples():
    assert list(summarize(make_run([True] * 12)).pass_at_k) == [1, 2, 4, 8, 12]


def test_one_sample_per_problem_has_wilsons_interval():
    summary = summarize(make_run(*[[True]] * 7, *[[False]] * 3))
    for estimate in (summary.avg_at_k, summary.majority_at_k, summary.pass_at_k[1], summary.accuracy_terminated):
        assert estimate.value == pytest.approx(0.7)
        assert [estimate.low, estimate.high] == pytest.approx([0.396778, 0.892209], abs=1e-6)


def test_terminated_and_budgets():
    samples = [
        make_sample("a", 0, True, num_tokens=3),
        make_sample("a", 1, True, num_tokens=8, terminated=False),
        make_sample("b", 0, True, num_tokens=4),
        make_sample("b", 1, False, num_tokens=5),
    ]
    summary = summarize(samples)
    assert summary.avg_at_k.value == 0.75
    assert summary.accuracy_terminated.value == pytest.approx(2 / 3)
    assert summary.truncation_rate.value == 0.25
    values = {budget: estimate.value for budget, estimate in summary.accuracy_at_budget.items()}
    assert values == {2: 0, 4: 0.5, 8: 0.5}
    assert summarize_table(SampleTable(samples), [3]).accuracy_at_budget[3].value == 0.25


@pytest.mark.parametrize(
    ("lengths", "budgets"),
    [([5], [4, 5]), ([1], [1]), ([8], [8]), ([3, 30], [2, 4, 8, 16, 30]), ([4, 33], [4, 8, 16, 32, 33])],
)
def test_token_budgets(lengths, budgets):
    assert token_budgets([make_sample(num_tokens=length) for length in lengths]) == budgets


def test_lengths():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 1000, size=(40, 5))
    samples = [make_sample(f"p{i:02}", j, num_tokens=int(lengths[i, j])) for i in range(40) for j in range(5)]
    summary = summarize(samples)
    assert summary.mean_tokens.value == pytest.approx(lengths.mean())
    assert summary.mean_tokens.low < lengths.mean() < summary.mean_tokens.high
    for percent, estimate in summary.token_quantiles.items():
        assert estimate.value == np.percentile(lengths, percent, method="inverted_cdf")
        assert estimate.low < estimate.value < estimate.high
    assert list(summary.token_quantiles) == [10, 50, 90]


def test_text_metrics():
    loop = "the same again " * 1000
    samples = [
        make_sample("a", 0, completion="Wait. It is unlikely, check.", num_tokens=100),
        make_sample("a", 1, completion="7", num_tokens=100, answer_format="bare"),
        make_sample("b", 0, completion="Hmm, wait.", num_tokens=500),
        make_sample("b", 1, completion=loop, num_tokens=500, terminated=False, answer=None, answer_format=None),
    ]
    summary = summarize(samples)
    assert summary.marker_substrings.value == pytest.approx(5 / 4)
    assert summary.marker_words.value == pytest.approx(4 / 4)
    assert summary.marker_words_per_1k_tokens.value == pytest.approx(1000 * 4 / 1200)
    assert summary.repetition_rate.value == 0.25
    assert summary.answer_formats == {"bare": 0.25, "boxed": 0.5, "none": 0.25}


def test_ungraded_samples_do_not_count():
    graded = make_run([True, False], [True, True], num_tokens=20)
    summary = summarize([*graded, make_sample("q", 0, None, num_tokens=50), make_sample("q", 1, None, num_tokens=50)])
    assert summary.num_ungraded == 2
    assert summary.num_problems == 3
    assert summary.mean_tokens.value == pytest.approx(30)
    for name in ("avg_at_k", "pass_at_k", "majority_at_k", "accuracy_terminated"):
        assert getattr(summary, name) == getattr(summarize(graded), name)
    assert summary.accuracy_at_budget[16].value == 0
    assert summary.accuracy_at_budget[32].value == 0.75


def test_nothing_graded():
    summary = summarize(make_run([None, None]))
    assert summary.avg_at_k is summary.majority_at_k is summary.accuracy_terminated is None
    assert summary.pass_at_k == summary.accuracy_at_budget == {}
    assert summary.mean_tokens == Estimate(10.0, None, None)


def test_nothing_terminated():
    summary = summarize(make_run([True, False], [False, False], terminated=False))
    assert summary.accuracy_terminated is None
    assert summary.avg_at_k.value == 0.25
    assert summary.truncation_rate.value == 1


def test_unfinished_run():
    """Each problem counts once, however many completions it has."""
    samples = make_run([True] * 6, [False, False], [True, False, False])
    samples = [
        dataclasses.replace(s, num_tokens=90, terminated=False) if s.problem_id == "p001" else s for s in samples
    ]
    summary = summarize(samples)
    assert summary.samples_per_problem == (2, 6)
    assert list(summary.pass_at_k) == [1, 2]
    assert summary.avg_at_k.value == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert summary.mean_tokens.value == pytest.approx((10 + 90 + 10) / 3)
    assert summary.truncation_rate.value == pytest.approx(1 / 3)


@st.composite
def runs(draw):
    problems = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=5))
    return [
        dataclasses.replace(sample, num_tokens=draw(st.integers(1, 40)), terminated=draw(st.booleans()))
        for sample in make_run(*problems)
    ]


@settings(max_examples=10, deadline=None)
@given(runs(), st.randoms())
def test_order_does_not_matter(samples, random):
    shuffled = list(samples)
    random.shuffle(shuffled)
    assert summarize(shuffled) == summarize(samples)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=10))
def test_one_vote_is_the_majority(verdicts):
    summary = summarize(make_run(*([verdict] for verdict in verdicts)))
    assert summary.majority_at_k == summary.avg_at_k == summary.pass_at_k[1]


# Bad input


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "no samples"),
        ([make_sample(), make_sample()], "Sample 0 of problem 'p0' is there twice"),
        ([make_sample(), make_sample("p1", benchmark="other")], "two benchmarks, 'made-up' and 'other'"),
        ([make_sample(), make_sample(sample_index=1, reference="8")], "two reference answers, '7' and '8'"),
        ([make_sample(num_tokens=0)], "has `num_tokens=0`"),
    ],
)
def test_bad_samples(samples, message):
    with pytest.raises(ValueError, match=message):
        summarize(samples)
