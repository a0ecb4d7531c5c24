"""Loss and gradient are those of a plain loop that knows neither the library's trainer nor its kernels."""

import pytest
import torch
from plain_loop import Method, Row, loss_and_gradient
from tiny import away_from, make_model

from trl_opsd import (
    OPSDCTrainer,
    OPSDTrainer,
    SelfDistillationTrainer,
)


COMPLETIONS = [[40, 12, 77, 3], [9, 81, 33, 54, 20, 66, 3], [25, 3], [17, 92, 45, 60, 31]]
BY_STUDENT = [[1, 1, 1, 1], [1, 1, 0, 0, 0, 1, 1], [1, 1], [1, 0, 1, 1, 1]]
REWARDS = [0.0, 1.0, 2.0, 5.0]
ADVANTAGES = [-0.5, 0.5, -1.5, 1.5]  # groups of two
ALL_OF_IT = {
    "divergence": "jsd",
    "jsd_weight": 0.3,
    "divergence_support": "union_top_k",
    "divergence_top_k": 6,
    "divergence_tail": "renormalize",
    "divergence_clip": 0.02,
    "temperature": 0.8,
    "teacher": "live",
    "policy_loss_coef": 0.7,
    "num_generations": 2,
    "scale_rewards": "none",
    "max_teacher_prompt_length": 600,
    "overlong_teacher_prompt": "skip",
}


def rollout(prompts, trainer):
    return {
        "prompt_ids": trainer._tokenize_prompts(prompts)[0],
        "completion_ids": COMPLETIONS,
        "logprobs": None,
        "env_mask": BY_STUDENT,
    }


def reward(completions, **kwargs):
    return REWARDS


@pytest.fixture
def rows(dataset):
    """Two rollouts of each of two prompts. The second prompt's solution is too long for ALL_OF_IT."""
    return [dataset[0], dataset[0], *[dict(dataset[1], solution="far too long " * 40)] * 2]


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def make(trainer_class=SelfDistillationTrainer, **settings):
        trainer = trainer_class(
            model=make_model(tokenizer),
            reward_funcs=reward if settings.get("policy_loss_coef") else None,
            args=trainer_class.config_class(**{**training_args, **settings}),
            train_dataset=dataset,
            processing_class=tokenizer,
            rollout_func=rollout,
        )
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


def plain_rows(trainer, rows, **given):
    """The rollouts, with prompts that are rendered here; what is given holds a value for each row."""
    tokenizer = trainer.processing_class
    made = []
    for index, row in enumerate(rows):
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=False, **(trainer.args.chat_template_kwargs or {})
        )
        teacher_prompt = trainer.teacher_prompt.token_ids(row, None)
        values = {name: value[index] for name, value in given.items()}
        made.append(Row(prompt, teacher_prompt, COMPLETIONS[index], BY_STUDENT[index], **values))
    return made


def assert_equals_plain(loss, model, expected):
    expected_loss, expected_gradient = expected
    loss.backward()  # of the last pass: the others' gradients are there
    gradient = {name: value.grad for name, value in model.named_parameters()}
    assert gradient.keys() == expected_gradient.keys()
    largest = max(value.abs().max() for value in expected_gradient.values()).item()
    assert largest > 1e-4
    assert loss.item() == pytest.approx(expected_loss, rel=1e-4)
    for name, value in expected_gradient.items():
        torch.testing.assert_close(gradient[name].double(), value, rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize(
    ("trainer_class", "method"),
    [
        (OPSDTrainer, Method("forward_kl", clip=0.05, temperature=1.1)),
        (OPSDCTrainer, Method("reverse_kl")),
    ],
)
def test_method_of_a_paper(make_trainer, rows, trainer_class, method):
    trainer = make_trainer(trainer_class)
    teacher = away_from(trainer.model)
    batch = trainer._generate_and_score_completions(rows)
    loss = trainer._compute_loss(trainer.model, batch)
    assert_equals_plain(
        loss, trainer.model, loss_and_gradient(trainer.model, teacher, plain_rows(trainer, rows), method)
    )


@pytest.mark.parametrize("max_tokens", [None, 700], ids=["whole", "cut"])
@pytest.mark.parametrize("loss_type", ["grpo", "luspo", "dr_grpo", "bnpo", "dapo"])
def test_composed(make_trainer, rows, loss_type, max_tokens):
    """GRPO's loss beside a divergence with weights, and rows without a context, whose tokens count for GRPO alone."""
    trainer = make_trainer(**ALL_OF_IT, loss_type=loss_type, max_tokens_per_microbatch=max_tokens)
    batch = trainer._generate_and_score_completions(rows)
    generator = torch.Generator().manual_seed(2)
    weights, old = (
        torch.rand(batch["completion_ids"].shape, generator=generator).to(batch["completion_ids"].device)
        for _ in range(2)
    )
    batch["importance_sampling_ratio"] = weights
    batch["old_per_token_logps"] = -4.5 + old  # ratios on both sides of the clip
    given = {
        "advantage": ADVANTAGES,
        "divergence_weights": [value[: len(ids)].tolist() for value, ids in zip(weights, COMPLETIONS, strict=True)],
        "old_log_probs": [
            value[: len(ids)].tolist() for value, ids in zip(batch["old_per_token_logps"], COMPLETIONS, strict=True)
        ],
    }
    plain = plain_rows(trainer, rows, **given)
    assert [row.teacher_prompt is None for row in plain] == [False, False, True, True]
    method = Method(
        "jsd",
        jsd_weight=0.3,
        support="union_top_k",
        top_k=6,
        tail="renormalize",
        clip=0.02,
        temperature=0.8,
        loss_type=loss_type,
        max_completion_length=8,
        policy_loss_coef=0.7,
    )
    expected = loss_and_gradient(trainer.model, trainer.model, plain, method)
    passes = []
    trainer.loss.networks.passes, cut = (
        lambda inputs: passes.append(cut(inputs)) or passes[-1],
        trainer.loss.networks.passes,
    )
    assert_equals_plain(trainer._compute_loss(trainer.model, batch), trainer.model, expected)
    assert len(passes[0]) == (1 if max_tokens is None else 3)


def test_likelihood(make_trainer, rows):
    """A loss that is v·(−log p_S) of each token takes no forward pass of its own."""
    trainer = make_trainer(teacher="live", loss_type="bnpo")
    batch = trainer._generate_and_score_completions(rows)
    v = torch.zeros_like(batch["completion_ids"], dtype=torch.float32)
    for index, ids in enumerate(COMPLETIONS):
        v[index, : len(ids)] = torch.linspace(0.5, 2.0, len(ids)) * torch.tensor(BY_STUDENT[index])

    def mean_of_tokens(inputs, log_probs):
        factors = v / batch["tool_mask"].mul(batch["completion_mask"]).sum()
        return -(factors * log_probs()[0]).sum(), factors

    loss = trainer.loss(trainer.model, batch, 1, 1, mean_of_tokens).loss
    given = [value[: len(ids)].tolist() for value, ids in zip(v, COMPLETIONS, strict=True)]
    method = Method(loss_type="bnpo", likelihood_coef=1.0)
    expected = loss_and_gradient(
        trainer.model, trainer.model, plain_rows(trainer, rows, likelihood_weights=given), method
    )
    assert_equals_plain(loss, trainer.model, expected)
