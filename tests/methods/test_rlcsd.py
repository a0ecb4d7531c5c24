import math
from dataclasses import replace

import pytest
import torch
from rollouts import make_rollouts
from three_tokens import make_batch, make_scores
from tiny import make_model

from trl_opsd import RLCSDConfig, SelfDistillationTrainer
from trl_opsd.context import PeersContext, Rollouts
from trl_opsd.methods.rlcsd import Contrast
from trl_opsd.trainer.checks.parts import check_parts_and_context


def shaped(part, advantage, ratios, contrasted=None, log=None):
    """Of a rollout whose tokens are so many times likelier to the teacher after a right peer than after wrong ones."""
    size = len(ratios)
    mask = torch.ones(1, size, dtype=torch.bool)
    teacher = torch.full((1, size), math.log(0.1))
    contrasted = mask if contrasted is None else torch.tensor([contrasted])
    nothing = torch.zeros(1, size)
    scores = replace(
        make_scores(),
        known=mask,
        teacher_log_prob=teacher,
        student_log_prob=nothing,
        contrasted=contrasted,
        contrast_log_prob=(teacher - torch.tensor([ratios]).log()).where(contrasted, 0.0),
    )
    batch = make_batch(mask, advantages=advantage, **({} if log is None else {"log": log}))
    return part(batch, scores).expand(1, size)[0].tolist()


R = 0.5 * math.tanh(0.01 / 0.02)
UP, DOWN = math.exp(0.01), math.exp(-0.01)


def test_exact_values():
    """Two of four tokens are marked, so that each counts twice in the mean of its set."""
    found = shaped(Contrast(), 0.7, [1.0, UP, DOWN, 1.0])
    assert found == pytest.approx([2 * 0.7, 2 * (0.7 + R), 2 * (0.7 - R), 2 * 0.7], rel=1e-4)
    found = shaped(Contrast(weight=0.5), -0.7, [1.0, UP, 1.0, 1.0])
    assert found == pytest.approx([4 / 3 * -0.7, 0.5 * 4 * (-0.7 + R), 4 / 3 * -0.7, 4 / 3 * -0.7], rel=1e-4)


def test_sign_of_the_advantage_stays():
    assert shaped(Contrast(), 0.1, [2.0, 0.5]) == pytest.approx([0.6, 0.0])
    assert shaped(Contrast(), -0.1, [2.0, 0.5]) == pytest.approx([0.0, -0.6])


def test_a_set_without_tokens_is_left_out():
    assert shaped(Contrast(), 0.3, [2.0, 2.0, 2.0]) == pytest.approx([0.8] * 3)
    assert shaped(Contrast(), 0.3, [1.0, 1.0, 1.0]) == [pytest.approx(0.3)] * 3


def test_equal_hints_are_grpo():
    logged = []
    found = shaped(Contrast(), 0.123456789, [1.0005, 0.9995], log=lambda *rate: logged.append(rate))
    assert found == [torch.tensor(0.123456789).item()] * 2  # |r| = .0125 is below the threshold
    [(name, marked, number)] = logged
    assert (name, marked.item(), number.item()) == ("contrast/marked_token_rate", 0, 2)


def test_what_is_not_contrasted_is_one_of_the_others():
    found = shaped(Contrast(), 0.3, [2.0, 2.0, 1.0, 1.0], contrasted=[True, False, False, False])
    assert found == pytest.approx([4 * 0.8, 0.4, 0.4, 0.4])
    assert shaped(Contrast(), 0.3, [2.0, 2.0], contrasted=[False, False]) == [pytest.approx(0.3)] * 2


def test_off_it_is_grpo_and_asks_for_nothing():
    off = Contrast(strength=0.0)
    assert not off.needs_scores
    assert not off.needs_contrast
    batch = make_batch(torch.ones(1, 3, dtype=torch.bool), advantages=0.123456789)
    assert off(batch, None) is batch.advantages


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"strength": -0.1}, {"threshold": -1.0}, {"weight": -1.0}])
def test_arguments_are_checked(wrong):
    with pytest.raises(ValueError, match="must not be negative and `scale` must be positive"):
        Contrast(**wrong)


# In a trainer


def halves(completions, **kwargs):
    """Of the four rollouts of a prompt, the first two are right."""
    return [float(index % 4 < 2) for index in range(len(completions))]


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args):
    def make(**settings):
        settings = {"per_device_train_batch_size": 8, "num_generations": 4, **settings}
        return SelfDistillationTrainer(
            make_model(tokenizer),
            reward_funcs=halves,
            args=RLCSDConfig(**{**training_args, **settings}),
            train_dataset=dataset,
            processing_class=tokenizer,
        )

    return make


def sampled(trainer, dataset, monkeypatch):
    """The batch of two prompts with four rollouts each, and the scores of its tokens."""
    seen = []
    score = trainer._score
    monkeypatch.setattr(trainer, "_score", lambda batch, mode: seen.extend([batch, score(batch, mode)]) or seen[1])
    trainer.model.train()
    trainer._generate_and_score_completions([row for row in dataset.select(range(2)) for _ in range(4)])
    return seen


def test_mean_is_one_of_probabilities(make_trainer, dataset, monkeypatch):
    """After one wrong peer, or two: wrong rollouts have one, right ones two."""
    trainer = make_trainer()
    batch, scores = sampled(trainer, dataset, monkeypatch)
    prompts = trainer._generation.contrasts
    assert [len(some) for some in prompts] == [2, 2, 1, 1] * 2
    assert scores.contrasted.equal(scores.known)
    assert scores.known.any(dim=1).all()

    def after(index, batch_size=8):
        some = [its[index : index + 1] for its in prompts]
        return trainer.loss.networks.contrasts(trainer.model, batch, some, batch_size)

    (_, first), (counts, second) = after(0), after(1, batch_size=3)
    assert counts.flatten().tolist() == [1, 1, 0, 0] * 2
    expected = torch.where(counts > 0, ((first.exp() + second.exp()) / 2).log(), first)
    torch.testing.assert_close(scores.contrast_log_prob[scores.known], expected[scores.known])
    assert not torch.allclose(first[0][scores.known[0]], second[0][scores.known[0]], atol=1e-3)


def test_the_same_rollout_as_both_hints_is_grpo(make_trainer, dataset, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(
        trainer.context, "contrast_messages", lambda row, rollouts: [trainer.context.teacher_messages(row, rollouts)]
    )
    _, scores = sampled(trainer, dataset, monkeypatch)
    torch.testing.assert_close(
        scores.contrast_log_prob[scores.known], scores.teacher_log_prob[scores.known], rtol=0, atol=1e-5
    )
    trained, grpo = (make_trainer(optim="sgd", learning_rate=0.1, **more) for more in ({}, {"advantage": "grpo"}))
    monkeypatch.setattr(
        trained.context, "contrast_messages", lambda row, rollouts: [trained.context.teacher_messages(row, rollouts)]
    )
    for one in (trained, grpo):
        torch.manual_seed(0)
        one.train()
    for name, value in grpo.model.state_dict().items():
        torch.testing.assert_close(trained.model.state_dict()[name], value, msg=name)


def test_wrong_peers_stand_where_right_ones_do():
    """In the same words, and without the rollout itself."""
    row, rollouts = {"prompt": [{"role": "user", "content": "Why?"}]}, make_rollouts([1.0, 1.0, 0.0, 0.0, 0.0])
    context = PeersContext(contrast=2)

    def read(index):
        group = Rollouts(rollouts, index)
        asked = context.teacher_messages(row, group)
        others = context.contrast_messages(row, group)
        return asked[0]["content"], [messages[0]["content"] for messages in others]

    right, wrong = read(0)
    assert wrong == [right.replace("y1", "y2"), right.replace("y1", "y3")]
    right, wrong = read(2)
    assert wrong == [right.replace("y0", "y3"), right.replace("y0", "y4")]
    # Without either there is nothing to contrast
    for rewards, index in (([1.0, 1.0], 0), ([0.0, 0.0], 0), ([1.0, 0.0], 0), ([1.0, 0.0], 1)):
        assert context.teacher_messages(row, Rollouts(make_rollouts(rewards), index)) is None
    assert context.contrast_messages(row, None) == []


def test_a_server_does_not_contrast(make_trainer):
    trainer = make_trainer()
    trainer.args.teacher_server_base_url = "http://localhost:1"
    with pytest.raises(ValueError, match="a server is asked for one"):
        check_parts_and_context(trainer.signals, trainer.context, trainer.args)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"privileged_context": "solution", "context_kwargs": None}, "gives one. Set it to 'peers'"),
        ({"context_kwargs": {"correct": 0, "wrong": 1, "contrast": 4}}, "`contrast=4` of the peers context shows"),
    ],
)
def test_nothing_to_contrast_with(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)
