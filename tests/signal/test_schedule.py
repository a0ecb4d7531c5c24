import json

import pytest

from trl_opsd.signal.schedule import Hysteresis, Linear


def test_linear():
    assert [Linear(0.5, 0.0, 30, delay=10)(step) for step in (0, 9, 10, 25, 40, 100)] == [0.5, 0.5, 0.5, 0.25, 0, 0]


def test_gate_closes_when_the_metric_falls_and_opens_when_it_is_back():
    """The trace of AntiSD: H / H_warm = 1, .94, .92, .95, .99, 1.0, .94."""
    gate = Hysteresis(0.5, warmup_steps=2)
    states = []
    for step, entropy in enumerate([3.0, 1.0, 2 * 1.0, 2 * 0.94, 2 * 0.92, 2 * 0.95, 2 * 0.99, 2 * 1.0, 2 * 0.94], 1):
        gate.observe(step, {"teacher_entropy": entropy})
        states.append(gate(step))
    assert states == [0.0, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.5, 0.5]


def test_step_without_a_measurement_changes_nothing():
    gate = Hysteresis(0.5, warmup_steps=1)
    gate.observe(1, {})
    assert gate(1) == 0.0
    gate.observe(2, {"teacher_entropy": 1.0})
    gate.observe(3, {"entropy": 0.1})
    assert gate(3) == 0.5


@pytest.mark.parametrize("num_observed", [1, 4])
def test_goes_on_from_its_state(num_observed):
    values = [1.0, 1.0, 0.9, 0.95, 1.0]
    whole, resumed = Hysteresis(0.5, warmup_steps=2), Hysteresis(0.5, warmup_steps=2)
    for step, value in enumerate(values, 1):
        whole.observe(step, {"teacher_entropy": value})
        if step == num_observed:
            resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        elif step > num_observed:
            resumed.observe(step, {"teacher_entropy": value})
    assert resumed(5) == whole(5) == 0.5
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(0.0, 1.0, 0), "`num_steps` must be at least 1"),
        (lambda: Hysteresis(0.5, low=1.1), "`low` must not be above `high`"),
        (lambda: Hysteresis(0.5, warmup_steps=0), "`warmup_steps` must be at least 1"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
