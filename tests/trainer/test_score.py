"""What student and teacher say of given completions."""

import pytest
import torch
from peft import LoraConfig

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer, score
from trl_opsd.trainer.rewards import group_advantages


COMPLETIONS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]


@pytest.fixture
def make_trainer(tokenizer, model, dataset, training_args):
    def make(reward_funcs=None, peft_config=None, rollout_func=None, **settings):
        return SelfDistillationTrainer(
            model,
            reward_funcs=reward_funcs,
            args=SelfDistillationConfig(
                **{**training_args, "temperature": 0.7, "per_device_eval_batch_size": 3, **settings}
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            rollout_func=rollout_func,
        )

    return make


def log_probs(model, prompt, completion):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion], device=model.device)).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / 0.7, dim=-1)


@pytest.mark.parametrize("lora", [False, True])
def test_scores_are_those_of_the_two_prompts(make_trainer, dataset, lora):
    peft_config = LoraConfig(target_modules="all-linear", init_lora_weights=False) if lora else None
    trainer = make_trainer(peft_config=peft_config, divergence="reverse_kl", teacher="live")
    rows = list(dataset.select(range(4)))
    before = torch.get_rng_state()
    scored = score(trainer, rows, COMPLETIONS)
    assert torch.get_rng_state().equal(before)
    assert scored.student_prompts == trainer.tokenize_prompts([row["prompt"] for row in rows])
    assert scored.teacher_prompts == [trainer.teacher_prompt.token_ids(row, None) for row in rows]
    trainer.model.eval()
    for index, ids in enumerate(COMPLETIONS):
        log_s, log_t = (
            log_probs(trainer.model, prompts[index], ids)
            for prompts in (scored.student_prompts, scored.teacher_prompts)
        )
        taken = torch.arange(len(ids)), torch.tensor(ids)
        expected = {
            "student_log_prob": log_s[taken],
            "teacher_log_prob": log_t[taken],
            "student_entropy": -(log_s.exp() * log_s).sum(-1),
            "teacher_entropy": -(log_t.exp() * log_t).sum(-1),
            "divergence": (log_s.exp() * (log_s - log_t)).sum(-1),
        }
        for name, values in expected.items():
            found = getattr(scored.scores, name)[index]
            torch.testing.assert_close(found[: len(ids)], values, rtol=1e-4, atol=1e-5)
            assert not found[len(ids) :].any()
        assert scored.scores.known[index].tolist() == [True] * len(ids) + [False] * (4 - len(ids))


def test_contexts_that_read_rollouts_are_told_of_rewards(make_trainer, dataset):
    settings = {"privileged_context": "peers", "num_generations": 2}
    trainer = make_trainer(lambda completions, **kwargs: [0.0] * len(completions), **settings)
    rows = [dataset[0]] * 4
    rewards = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    scored = score(trainer, rows, COMPLETIONS, rewards, num_generations=2)
    has_context = [prompt is not None for prompt in scored.teacher_prompts]
    assert has_context == [False, True, False, False]
    assert scored.scores.known.any(dim=1).tolist() == has_context
    assert not score(trainer, rows, COMPLETIONS, num_generations=2).scores.known.any()


@pytest.mark.parametrize(
    ("completions", "message"),
    [([[5]], "has 1 completions of 2 rows"), ([[5], []], r"`completion_ids\[1\]` has no token")],
)
def test_completions_that_cannot_be_scored(make_trainer, dataset, completions, message):
    with pytest.raises(ValueError, match=message):
        score(make_trainer(), list(dataset.select(range(2))), completions)


def first_token(completion_ids, **kwargs):
    return [float(ids[0] % 4) for ids in completion_ids]


def length(completion_ids, **kwargs):
    return [None if len(ids) == 1 else float(len(ids)) for ids in completion_ids]


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_given_completions_are_grpos(make_trainer, dataset, monkeypatch, scale, aggregation):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    completions = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [15]]
    trainer = make_trainer(
        [first_token, length],
        rollout_func=lambda prompts, trainer: {
            "prompt_ids": trainer.tokenize_prompts(prompts),
            "completion_ids": completions,
            "logprobs": None,
        },
        policy_loss_coef=1.0,
        num_generations=2,
        scale_rewards=scale,
        multi_objective_aggregation=aggregation,
        reward_weights=[1.0, 0.3],
    )
    batch = trainer._generate_and_score_completions([dataset[index] for index in (0, 0, 1, 1)])
    rewards = torch.tensor([first_token(completions), [3.0, 2.0, 4.0, torch.nan]]).T
    found = group_advantages(rewards, trainer.reward_weights, 2, scale, aggregation)
    assert found.abs().max() > 0.1
    torch.testing.assert_close(found, batch["advantages"].cpu())
