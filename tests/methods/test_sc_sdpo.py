import pytest
import torch
from three_tokens import make_batch

from trl_opsd.methods.sc_sdpo import SweetSpot


def weights_of(part, *rates):
    """Of groups of two rollouts, one weight each."""
    rates = torch.tensor(rates).repeat_interleave(2)
    found = part(make_batch(torch.ones(len(rates), 3).bool(), success_rate=rates, group_size=2), None)
    assert found.shape == (len(rates), 1)
    assert found[::2].equal(found[1::2])
    return found[::2].flatten().tolist()


def test_exact_values():
    assert weights_of(SweetSpot(), 0.5, 0.25, 1.0) == pytest.approx([1.0718, 0.9282, 0.0], abs=1e-4)


def test_mean_over_undecided_groups_is_one():
    found = weights_of(SweetSpot(1.0), 0.0, 0.125, 0.5, 0.75, 1.0, torch.nan)
    assert found[0] == found[4] == found[5] == 0.0
    assert sum(found[1:4]) / 3 == pytest.approx(1.0)


def test_mean_is_that_of_all_processes():
    """Of the groups of the exact values, this one has the second alone."""
    elsewhere = torch.tensor([0.5, 0.5, 0.0, 0.0]).view(-1, 1)  # weights of the first and the third
    batch = make_batch(
        torch.ones(2, 3).bool(), success_rate=0.25, group_size=2, gather=lambda own: torch.cat([own, elsewhere])
    )
    assert SweetSpot()(batch, None).flatten().tolist() == pytest.approx([0.9282] * 2, abs=1e-4)


@pytest.mark.parametrize("rates", [(0.0, 1.0), (torch.nan,)])
def test_nothing_undecided_weighs_nothing(rates):
    assert weights_of(SweetSpot(), *rates) == [0.0] * len(rates)


def test_off_every_group_weighs_exactly_one():
    assert weights_of(SweetSpot(0.0), 0.0, 0.125, 0.3, 1.0) == [1.0] * 4


def test_negative_exponent():
    with pytest.raises(ValueError, match="`exponent` must not be negative, got -1"):
        SweetSpot(-1)
