import math

import pytest
import torch
from tiny import make_model

from trl_opsd import PurifiedOPSDConfig, SelfDistillationTrainer
from trl_opsd.methods.purified_opsd import Purified, ReferenceAlone
from trl_opsd.trainer.checks.parts import check_parts_and_context


P_0, P_T, P_C = ([[0.6, 0.3, 0.1]], [[0.2, 0.5, 0.3]], [[0.3, 0.3, 0.4]])


def target(part, teacher=P_T, plain=P_0, contrast=P_C, shift=0.0):
    log_probs = [torch.tensor(p, dtype=torch.float64).log() for p in (teacher, plain, contrast)]
    return part(log_probs[0] + shift, *log_probs[1:]).softmax(dim=-1)[0].tolist()


def test_exact_values():
    """Δ̃ is (−.344555, .570978, −.226869), and (−.149396, .203872, −.106258) with c = ½ and over β = 2."""
    assert target(Purified()) == pytest.approx([0.410419, 0.512635, 0.076946], abs=1e-6)
    assert target(Purified(beta=2.0, clip=0.5)) == pytest.approx([0.530259, 0.377468, 0.092272], abs=1e-6)


def test_without_a_difference_the_target_is_the_model_without_the_reference():
    assert target(Purified(), contrast=P_T) == pytest.approx(P_0[0])
    assert target(Purified(beta=math.inf)) == pytest.approx(P_0[0])


def test_a_constant_changes_nothing():
    assert target(Purified(), shift=3.0) == pytest.approx(target(Purified()))


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"clip": -1.0}])
def test_arguments_are_checked(wrong):
    with pytest.raises(ValueError, match="`beta` and `clip` must be positive"):
        Purified(**wrong)


# What the teacher reads for contrast


def test_reference_stands_alone_in_the_same_words():
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Well?"}]
    prompt += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "How many?"}]
    context, row = ReferenceAlone(), {"prompt": prompt, "solution": "Forty-two."}
    [*_, read] = context.teacher_messages(row, None)
    [[system, alone]] = context.contrast_messages(row, None)
    assert system == prompt[0]
    assert alone == {"role": "user", "content": read["content"].replace("How many?", "").strip()}
    assert "Forty-two." in alone["content"]
    assert ReferenceAlone("key", "{prompt}\nKey: {key}").contrast_messages({**row, "key": "8"}, None) == [
        [prompt[0], {"role": "user", "content": "Key: 8"}]
    ]


# In a trainer


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args):
    def make(**settings):
        return SelfDistillationTrainer(
            make_model(tokenizer),
            args=PurifiedOPSDConfig(**{**training_args, "max_completion_length": 8, **settings}),
            train_dataset=dataset,
            processing_class=tokenizer,
        )

    return make


def trained(trainer):
    torch.manual_seed(0)
    trainer.train()
    return trainer.model.state_dict()


def test_a_reference_that_says_the_same_without_the_question_teaches_nothing(make_trainer, monkeypatch):
    trainer = make_trainer(optim="sgd", learning_rate=0.1)
    context = trainer.context
    monkeypatch.setattr(context, "contrast_messages", lambda row, rollouts: [context.teacher_messages(row, rollouts)])
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for name, value in trained(trainer).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


def test_without_its_part_it_learns_from_the_model_without_the_reference(make_trainer):
    sgd = {"optim": "sgd", "learning_rate": 0.1, "teacher": "ema", "teacher_update_rate": 0.01, "temperature": 1.0}
    off = make_trainer(**sgd, target_kwargs={"beta": math.inf})
    parent = make_trainer(**sgd, target=None, privileged_context="none")
    for trainer in (off, parent):  # a student that has moved away from its teacher
        trainer.model.lm_head.weight.data += 0.1 * torch.randn(
            trainer.model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)
        )
    before = off.model.state_dict()["lm_head.weight"].clone()
    own, parents = trained(off), trained(parent)
    assert not own["lm_head.weight"].allclose(before, atol=1e-5)
    for name, value in own.items():
        torch.testing.assert_close(value, parents[name], rtol=1e-5, atol=1e-6)


def test_coefficients_follow_a_schedule(make_trainer):
    trainer = make_trainer(schedules={"target.beta": {"start": 1.0, "end": 3.0, "num_steps": 2}})
    trainer.signals.begin_step(1)
    log_probs = [torch.tensor(p).log() for p in (P_T, P_0, P_C)]
    assert trainer.signals.combine(*log_probs).equal(Purified(beta=2.0)(*log_probs))
    assert trainer.signals.description == "divergence from Purified"


def test_a_row_whose_prompt_for_contrast_is_too_long_has_no_context(make_trainer, dataset, monkeypatch):
    trainer = make_trainer(overlong_teacher_prompt="skip")
    contrast_messages = trainer.context.contrast_messages

    def long_for_the_first(row, rollouts):
        [[message]] = contrast_messages(row, rollouts)
        is_first = row["solution"] == dataset[0]["solution"]
        return [[{**message, "content": message["content"] * (100 if is_first else 1)}]]

    monkeypatch.setattr(trainer.context, "contrast_messages", long_for_the_first)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([dataset[index] for index in (0, 1)])
    assert batch["has_context"].tolist() == [False, True]


def test_one_prompt_for_contrast_at_most(make_trainer, dataset, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer.context, "contrast_messages", lambda row, rollouts: [row["prompt"]] * 2)
    with pytest.raises(ValueError, match="ReferenceAlone gives 2 prompts to contrast one rollout with"):
        trainer._generate_and_score_completions([dataset[0]])


def test_scores_are_those_of_the_target(make_trainer, dataset):
    from trl_opsd import score

    rows, completions = [dataset[0]], [[5, 6, 7]]
    trainer, plain = make_trainer(), make_trainer(target_kwargs={"beta": math.inf})
    found, without = (score(one, rows, completions).scores for one in (trainer, plain))
    # The teacher is the student, but for what it reads
    torch.testing.assert_close(without.teacher_log_prob, without.student_log_prob)
    assert not found.teacher_log_prob.allclose(found.student_log_prob, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"privileged_context": "solution"}, "gives one. Set it to 'peers'"),
        ({"token_weights": {"trl_opsd.methods.msd.DualPerspective": {}}}, "puts another distribution in its place"),
        ({"target": "builtins.dict"}, "`target` names dict, which is no subclass of Target"),
    ],
)
def test_what_cannot_work_is_refused(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)


def test_a_server_is_asked_for_one(make_trainer):
    trainer = make_trainer()
    trainer.args.teacher_server_base_url = "http://localhost:1"
    with pytest.raises(ValueError, match="a server is asked for one"):
        check_parts_and_context(trainer.signals, trainer.context, trainer.args)
