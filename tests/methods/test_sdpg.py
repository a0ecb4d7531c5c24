import pytest
import torch
from three_tokens import make_batch

from trl_opsd.methods import config_class
from trl_opsd.methods.sdpg import PositiveAdvantage, RiseAndFall
from trl_opsd.trainer.signals import make_signals


MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])


def test_rollouts_below_the_mean_are_not_pulled_and_count_in_the_mean(tmp_path):
    args = config_class("sdpg")(str(tmp_path), use_cpu=True)
    streams = make_signals(args).streams(make_batch(MASK, advantages=torch.tensor([0.5, 0.0, -0.5])), None)
    assert streams["divergence_weights"].tolist() == [[1.0, 1.0, 1.0], [0.0] * 3, [0.0] * 3]
    assert streams["divergence_mask"].equal(MASK)
    assert streams["likelihood_weights"].equal(MASK.float())
    assert streams["advantages"].tolist() == [0.5, 0.0, -0.5]


def test_share_of_them_is_logged():
    logged = {}
    batch = make_batch(
        MASK, advantages=torch.tensor([0.5, 0.1, -0.5]), log=lambda name, *pair: logged.update({name: pair})
    )
    PositiveAdvantage()(batch, None)
    assert {name: (int(total), int(count)) for name, (total, count) in logged.items()} == {
        "positive_advantage_rate": (2, 3)
    }


def test_coefficient_rises_and_falls():
    schedule = RiseAndFall(value=0.4, total_steps=20, warmup_steps=4, decay_steps=10)
    found = [schedule(step) for step in (0, 1, 4, 9, 10, 15, 19, 20, 25)]
    assert found == pytest.approx([0.0, 0.1, 0.4, 0.4, 0.4, 0.2, 0.04, 0.0, 0.0])
    assert [RiseAndFall(0.4, 20)(step) for step in (0, 10, 19, 20)] == [0.4] * 4


@pytest.mark.parametrize("steps", [(-1, 0), (0, -1), (15, 10)])
def test_steps_that_do_not_fit(steps):
    with pytest.raises(ValueError, match="`warmup_steps` and `decay_steps` must not be negative, nor more than"):
        RiseAndFall(0.4, 20, *steps)


def test_its_own_schedule_can_be_named(tmp_path):
    schedule = {"kind": "trl_opsd.methods.sdpg.RiseAndFall", "value": 0.4, "total_steps": 10, "warmup_steps": 4}
    signals = make_signals(config_class("sdpg")(str(tmp_path), use_cpu=True, schedules={"divergence_coef": schedule}))
    signals.begin_step(2)
    assert signals.coefficients["divergence_coef"] == pytest.approx(0.2)
