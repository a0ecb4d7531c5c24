import math

import pytest
import torch
from datasets import Dataset
from methods.stand_ins import Sampler, begins_with_r
from three_tokens import make_batch
from tiny import make_model
from trl import GRPOTrainer

from trl_opsd import SelfDistillationTrainer, VPDConfig
from trl_opsd.methods.vpd import EStep
from trl_opsd.signal import TokenScores


def scores_of(deltas, known=True):
    """Of completions of one token, from log q − log p_S."""
    delta = torch.tensor(deltas).unsqueeze(1)
    nothing = torch.zeros_like(delta)
    known = torch.as_tensor(known).expand(len(deltas)).unsqueeze(1)
    return TokenScores(known, nothing, delta, nothing, nothing, nothing)


def batch_of(correct, **given):
    found = {}

    def log(name, numerator, denominator):
        found[name] = (float(numerator), float(denominator))

    mask = torch.ones(len(correct), 1).bool()
    return make_batch(**{"mask": mask, "correct": correct, "log": log, **given}), found


def taken(part, deltas, correct, known=True, **given):
    batch, found = batch_of(correct, **given)
    factors = part(batch, scores_of(deltas, known) if part.needs_scores or known is not True else None)
    return factors, found


@pytest.mark.parametrize(
    ("deltas", "expected"), [((3.0, 3.0), 1.386294), ((2.0, -2.0), 1.196278), ((12.0, 8.0), 1.196278)]
)
def test_exact_values(deltas, expected):
    part = EStep(every=1)
    factors, found = taken(part, deltas, (True, False))
    assert found["e_step/loss"][0] == pytest.approx(expected, abs=1e-6)
    assert found["e_step/delta"][0] == pytest.approx(0.05 * sum(deltas), abs=1e-6)
    assert part.reads_context
    assert not factors["divergence"].any()
    slope = 0.1 * 2 / (1 + math.exp(0.05 * (deltas[0] - deltas[1])))
    assert factors["likelihood"].flatten().tolist() == pytest.approx([slope, -slope])


def test_slopes_are_the_gradient_of_the_loss():
    log_q = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], requires_grad=True)
    right = torch.tensor([True, True, False, False, False])
    ratio = 0.3 * log_q
    delta = (0.5 * (ratio[right].mean() + ratio[~right].mean())).detach()
    loss = -torch.sigmoid(ratio[right] - delta).log().mean() - torch.sigmoid(delta - ratio[~right]).log().mean()
    loss.backward()
    factors, found = taken(EStep(every=1, beta=0.3), log_q.tolist(), right)
    assert found["e_step/loss"][0] == pytest.approx(loss.item(), abs=1e-6)
    # Each is the weight of −log q in a mean over five rows
    torch.testing.assert_close(-factors["likelihood"].flatten() / 5, log_q.grad)


def test_a_constant_more_changes_nothing():
    deltas = (1.0, -2.0, 0.5)
    one, other = (taken(EStep(every=1), [x + more for x in deltas], (True, False, False)) for more in (0.0, 7.0))
    torch.testing.assert_close(one[0]["likelihood"], other[0]["likelihood"])
    assert one[1]["e_step/loss"] == pytest.approx(other[1]["e_step/loss"], abs=1e-6)


def test_every_fifth_batch_and_what_is_remembered():
    part, kinds = EStep(decay=0.9), []
    for number in range(1, 11):
        assert part.needs_scores == (number % 5 == 0)
        other = number * 1.0
        factors, found = taken(part, (other, other), (True, False))
        kinds.append(part.reads_context)
        assert factors["divergence"].all() == (not part.reads_context)
        assert factors["likelihood"].any() == part.reads_context
        assert found["e_step/rate"] == (float(part.reads_context), 1.0)
        # What is evaluated is never such a batch, and is not counted
        evaluated, logged = taken(part, (1.0, 1.0), (True, False), is_training=False)
        assert not part.reads_context
        assert evaluated["divergence"].all()
        assert not evaluated["likelihood"].any()
        assert not logged
    assert kinds == ([False] * 4 + [True]) * 2
    assert part.state_dict() == {"num_batches": 10, "delta": pytest.approx(0.9 * 0.5 + 0.1 * 1.0)}
    again = EStep(decay=0.9)
    again.load_state_dict(part.state_dict())
    assert again == part


@pytest.mark.parametrize(
    ("correct", "given"),
    [
        ((True, True), {}),
        ((False, False), {}),
        ((True, False), {"known": [True, False]}),
        ((True, False), {"rewards": [1.0, math.nan]}),
    ],
)
def test_a_batch_that_cannot_be_told_apart_is_skipped(correct, given):
    part = EStep(every=1)
    factors, found = taken(part, (1.0, 2.0), correct, **given)
    assert found == {"e_step/rate": (0.0, 1.0), "e_step/skip_rate": (1.0, 1.0)}
    assert factors["divergence"].all()
    assert not factors["likelihood"].any()
    assert not part.reads_context
    assert part.state_dict() == {"num_batches": 1, "delta": None}


def test_rows_of_two_processes():
    rows = []
    whole, _ = taken(
        EStep(every=1), (1.0, -1.0, 2.0), (True, False, False), gather=lambda own: rows.append(own) or own
    )
    some, _ = taken(EStep(every=1), (-1.0, 2.0), (False, False), first=1, gather=lambda own: rows[0])
    assert some["likelihood"].equal(whole["likelihood"][1:])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"every": 0}, "`every` must be"), ({"beta": 0.0}, "`beta` must be"), ({"decay": 1.0}, "`decay` must be")],
)
def test_numbers_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EStep(**kwargs)


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args, monkeypatch):
    def make(**settings):
        sampler = Sampler(tokenizer)
        monkeypatch.setattr(
            GRPOTrainer, "_generate_single_turn", lambda trainer, prompt_ids, *args: (sampler(prompt_ids), None)
        )
        args = {**training_args, "num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 4, **settings}
        return SelfDistillationTrainer(
            make_model(tokenizer),
            begins_with_r,
            args=VPDConfig(**args),
            train_dataset=dataset,
            processing_class=tokenizer,
        )

    return make


def trained(trainer):
    torch.manual_seed(0)
    trainer.train()
    return trainer.model.state_dict(), [entry for entry in trainer.state.log_history if "loss" in entry]


def test_until_the_fifth_batch_it_is_the_m_step(make_trainer):
    weights, steps = trained(make_trainer())
    expected, _ = trained(make_trainer(token_weights={}, likelihood_coef=0.0))
    assert all(value.equal(expected[name]) for name, value in weights.items())
    assert [step["e_step/rate"] for step in steps] == [0.0] * 4


def test_turns(make_trainer):
    """In an E-step nothing is distilled, and no teacher is read but to score."""
    trainer = make_trainer(token_weights={"trl_opsd.methods.vpd.EStep": {"every": 2}}, max_steps=6)
    _, steps = trained(trainer)
    for number, step in enumerate(steps, 1):
        is_e_step = step["e_step/rate"] == 1.0
        assert is_e_step == (number % 2 == 0 and step["e_step/skip_rate"] == 0.0)
        assert ("distillation_loss" in step) == (not is_e_step and step["divergence_row_rate"] > 0)
        assert ("likelihood_loss" in step) == is_e_step
    assert any(step["e_step/rate"] for step in steps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "ema"}, "`teacher='ema'` is another. Set `teacher='live'`"),
        ({"privileged_context": "none"}, "`privileged_context='none'` is the student's"),
        ({"policy_loss_coef": 1.0}, "`policy_loss_coef=1.0` is of the student's"),
        ({"beta": 0.1}, "`beta=0.1` is of the student's"),
        ({"token_weights": {"trl_opsd.methods.vpd.EStep": {}, "importance_clip": {}}}, "ImportanceClip is of the"),
    ],
)
def test_what_cannot_take_turns_is_refused(training_args, model_path, settings, message, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda *_, **__: pytest.fail("loaded"))
    args = VPDConfig(**{**training_args, "num_generations": 4, **settings})
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "What is 3 + 4?"}]}] * 4)
    with pytest.raises(ValueError, match=message):
        SelfDistillationTrainer(model_path, begins_with_r, args=args, train_dataset=rows)
