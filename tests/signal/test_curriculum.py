import json
from collections import Counter

import pytest
import torch
from three_tokens import make_batch

from trl_opsd.signal.curriculum import ByPassRate
from trl_opsd.signal.pass_rates import PassRates


def batch_of(keys, rates, **given):
    values = {"prompt_keys": torch.tensor(keys), "success_rate": torch.tensor(rates), "group_size": 1}
    return make_batch(torch.ones(len(keys), 1).bool(), **values | given)


def test_pass_rates_are_a_moving_average():
    rates = PassRates(0.25)
    rates.see(batch_of([5, 5, 7], [0.5, 0.5, torch.nan]))
    assert (rates[5], rates[7], rates[9]) == (0.5, None, None)
    rates.see(batch_of([5, 7], [1.0, 0.0]))
    assert (rates[5], rates[7]) == (0.625, 0.0)
    resumed = PassRates(0.25)
    resumed.load_state_dict(json.loads(json.dumps(rates.state_dict())))
    assert (resumed[5], resumed[7]) == (0.625, 0.0)


def test_evaluations_count_for_nothing():
    rates = PassRates(0.5)
    batch = batch_of([5], [0.5])
    rates.see(type(batch)(**{**vars(batch), "is_training": False}))
    assert rates[5] is None


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_share_out_of_range(share):
    with pytest.raises(ValueError, match=r"share of the newest pass rate must be in \(0, 1\]"):
        PassRates(share)


def test_weights():
    curriculum = ByPassRate(floor=0.1)
    curriculum.see(batch_of([1, 2, 3, 4], [0.0, 0.5, 0.9, 1.0]))
    assert curriculum.weights([1, 2, 3, 4, 5]).tolist() == pytest.approx([0.1, 1.0, 0.6, 0.1, 1.0])
    assert ByPassRate(exponent=0.0).weights([1]).tolist() == [1.0]
    with pytest.raises(ValueError, match=r"`floor` in \(0, 1\], got 0.5 and 0.0"):
        ByPassRate(floor=0.0)


def test_draws_follow_the_weights():
    curriculum = ByPassRate(floor=0.25)
    curriculum.see(batch_of([1, 2, 3], [0.0, 0.5, 1.0]))
    drawn = Counter(curriculum.draw(0, index, [1, 2, 3], 1)[0] for index in range(3000))
    assert drawn[1] / 3000 == pytest.approx(1 / 1.5, abs=0.03)
    assert drawn[0] / 3000 == pytest.approx(0.25 / 1.5, abs=0.03)
    assert all(len(set(curriculum.draw(1, index, [1, 2, 3], 2))) == 2 for index in range(50))


def test_a_resumed_epoch_draws_the_same_although_more_is_known():
    whole = ByPassRate()
    keys = list(range(10))
    first = [whole.draw(3, index, keys, 4) for index in range(2)]
    whole.see(batch_of(keys, [1.0] * 5 + [0.5] * 5))
    resumed = ByPassRate()
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert [resumed.draw(3, index, keys, 4) for index in range(2)] == first
    assert [resumed.draw(3, 2, keys, 4), resumed.draw(4, 0, keys, 4)] == [
        whole.draw(3, 2, keys, 4),
        whole.draw(4, 0, keys, 4),
    ]
    assert ByPassRate().draw(3, 0, keys, 4) == first[0]
