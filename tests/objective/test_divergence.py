import math

import pytest
import torch

from trl_opsd.objective import pointwise_divergence
from trl_opsd.objective.divergence import bounded, sampled_divergence


# Two tokens. Teacher (3/4, 1/4), student (1/2, 1/2).
LOG_T = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
LOG_S = torch.tensor([0.5, 0.5], dtype=torch.float64).log()

# By hand: 3/4 ln(3/2) + 1/4 ln(1/2), and 1/2 ln(2/3) + 1/2 ln 2.
FORWARD = 0.130812035941137
REVERSE = 0.143841036225890
# m = (9/16, 7/16): 1/4 [3/4 ln(4/3) + 1/4 ln(4/7)] + 3/4 [1/2 ln(8/9) + 1/2 ln(8/7)]
JSD_QUARTER = 0.024870035701797
# m = (11/16, 5/16): 3/4 [3/4 ln(12/11) + 1/4 ln(4/5)] + 1/4 [1/2 ln(8/11) + 1/2 ln(8/5)]
JSD_THREE_QUARTERS = 0.026048220951153


def value(divergence, weight=0.5, log_s=LOG_S, log_t=LOG_T):
    return pointwise_divergence(log_s, log_t, divergence, weight)[0].sum().item()


@pytest.mark.parametrize(
    ("divergence", "weight", "expected"),
    [
        ("forward_kl", 0.5, FORWARD),
        ("reverse_kl", 0.5, REVERSE),
        ("jsd", 0.25, JSD_QUARTER),
        ("jsd", 0.75, JSD_THREE_QUARTERS),
        # The end points stand for the KLs the formula itself does not reach
        ("jsd", 0.0, FORWARD),
        ("jsd", 0, FORWARD),
        ("jsd", 1.0, REVERSE),
        ("jsd", 1, REVERSE),
    ],
)
def test_two_tokens_by_hand(divergence, weight, expected):
    assert value(divergence, weight) == pytest.approx(expected, abs=1e-14)


def test_entries_by_hand():
    forward, _ = pointwise_divergence(LOG_S, LOG_T, "forward_kl")
    reverse, _ = pointwise_divergence(LOG_S, LOG_T, "reverse_kl")

    assert forward.tolist() == pytest.approx([0.75 * math.log(1.5), 0.25 * math.log(0.5)])
    assert reverse.tolist() == pytest.approx([0.5 * math.log(2 / 3), 0.5 * math.log(2)])


def test_jsd_weight_is_ignored_by_the_kls():
    assert value("forward_kl", 0.9) == value("forward_kl", 0.1)
    assert value("reverse_kl", 0.9) == value("reverse_kl", 0.1)


def test_jsd_swaps_its_weight_with_its_sides():
    assert value("jsd", 0.5) == pytest.approx(value("jsd", 0.5, log_s=LOG_T, log_t=LOG_S), abs=1e-15)
    assert value("jsd", 0.25) == pytest.approx(value("jsd", 0.75, log_s=LOG_T, log_t=LOG_S), abs=1e-15)
    assert value("jsd", 0.25) != pytest.approx(value("jsd", 0.75), abs=1e-4)


def test_jsd_tends_to_zero_where_its_end_points_do_not():
    assert value("jsd", 1e-9) < 1e-8 < value("jsd", 0.0)
    assert value("jsd", 1 - 1e-9) < 1e-8 < value("jsd", 1.0)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_slopes_are_derivatives_of_the_entries(divergence):
    generator = torch.Generator().manual_seed(0)
    log_t = torch.randn(3, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_s = torch.randn(3, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    step = 1e-6

    above, _ = pointwise_divergence(log_s + step, log_t, divergence, 0.3)
    below, _ = pointwise_divergence(log_s - step, log_t, divergence, 0.3)
    _, slopes = pointwise_divergence(log_s, log_t, divergence, 0.3)

    torch.testing.assert_close(slopes, (above - below) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("divergence", "weight"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.25)])
def test_token_impossible_for_both_changes_nothing(divergence, weight):
    impossible = torch.tensor([-math.inf], dtype=torch.float64)

    entries, slopes = pointwise_divergence(
        torch.cat([LOG_S, impossible]), torch.cat([LOG_T, impossible]), divergence, weight
    )
    expected_entries, expected_slopes = pointwise_divergence(LOG_S, LOG_T, divergence, weight)

    assert entries.tolist() == [*expected_entries.tolist(), 0.0]
    assert slopes.tolist() == [*expected_slopes.tolist(), 0.0]


def test_token_impossible_for_one_side():
    certain = torch.tensor([0.0, -math.inf], dtype=torch.float64)

    # Certain teacher, undecided student, and the other way around
    assert value("forward_kl", log_t=certain, log_s=LOG_S) == pytest.approx(math.log(2))
    assert value("reverse_kl", log_t=certain, log_s=LOG_S) == math.inf
    assert value("forward_kl", log_t=LOG_S, log_s=certain) == math.inf
    assert value("reverse_kl", log_t=LOG_S, log_s=certain) == pytest.approx(math.log(2))
    # m = (3/4, 1/4): 1/2 ln(4/3) + 1/2 [1/2 ln(2/3) + 1/2 ln 2]
    expected = math.log(4 / 3) / 2 + REVERSE / 2
    assert value("jsd", 0.5, log_t=certain, log_s=LOG_S) == pytest.approx(expected)
    assert value("jsd", 0.5, log_t=LOG_S, log_s=certain) == pytest.approx(expected)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_probabilities_at_hand_are_used(divergence):
    given = pointwise_divergence(LOG_S, LOG_T, divergence, 0.3, p_s=LOG_S.exp(), p_t=LOG_T.exp())
    halved = pointwise_divergence(LOG_S, LOG_T, divergence, 0.3, p_s=LOG_S.exp() / 2, p_t=LOG_T.exp() / 2)

    for found, expected in zip(given, pointwise_divergence(LOG_S, LOG_T, divergence, 0.3), strict=True):
        assert torch.equal(found, expected)
    assert not torch.allclose(halved[0], given[0])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("sides", ["student", "teacher", "both"])
def test_nan_is_not_hidden(divergence, sides):
    nan = torch.full((2,), math.nan)
    log_s, log_t = nan if sides != "teacher" else LOG_S, nan if sides != "student" else LOG_T

    entries, slopes = pointwise_divergence(log_s, log_t, divergence)

    assert (entries + slopes).isnan().all()


@pytest.mark.parametrize("log_s", [-1.0, -60.0, -120.0, -600.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_an_improbable_sampled_token_is_as_exact_as_any(divergence, log_s):
    log_p = torch.tensor([[log_s]]), torch.tensor([[log_s + 3.0]])

    value, slope = (result.item() for result in sampled_divergence(*log_p, divergence, 0.3))

    ratio, mixture = math.exp(3.0), 0.3 * math.exp(3.0) + 0.7
    expected = {
        "forward_kl": (3.0 * ratio, 1 - ratio),
        "reverse_kl": (-3.0, -3.0),
        "jsd": (0.3 * ratio * (3.0 - math.log(mixture)) - 0.7 * math.log(mixture), -0.7 * math.log(mixture)),
    }[divergence]
    assert (value, slope) == pytest.approx(expected, rel=1e-4)


# The teacher within a range of multiples of the student, in the vectors of RESD

FAR_S, FAR_T = (torch.tensor(p, dtype=torch.float64).log() for p in ((0.9, 0.05, 0.05), (0.05, 0.9, 0.05)))


@pytest.mark.parametrize(
    ("bounds", "expected"), [((None, None), 2.456816), ((0.2, 5.0), 1.368022), ((0.2, None), 1.303976)]
)
def test_bounded_teacher(bounds, expected):
    entries, _ = pointwise_divergence(FAR_S, bounded(FAR_S, FAR_T, *bounds), "reverse_kl")
    assert entries.sum().item() == pytest.approx(expected, abs=1e-6)


def test_a_teacher_within_the_bounds_stays():
    """All ratios are a third, 1 and 5."""
    log_s, log_t = (torch.tensor(p, dtype=torch.float64).log() for p in ((0.6, 0.3, 0.1), (0.2, 0.3, 0.5)))
    torch.testing.assert_close(bounded(log_s, log_t, 0.2, 5.000001), log_t, rtol=0, atol=0)
    assert bounded(log_s, log_t, None, None) is log_t


def test_what_nobody_expects_stays_nothing():
    impossible = torch.tensor([0.0, -torch.inf])
    for log_s, log_t in ((impossible, impossible), (impossible, torch.tensor([0.5, 0.5]).log())):
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            entries, slopes = pointwise_divergence(log_s, bounded(log_s, log_t, 0.2, 5.0), divergence)
            assert entries.isfinite().all()
            assert slopes.isfinite().all()
