"""Rollouts, rewards and what is logged about them."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import make_model, make_tokenizer
from transformers import Qwen3ForSequenceClassification
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_chat_template

from trl_opsd import (
    OPSDCConfig,
    OPSDConfig,
    OPSDCTrainer,
    OPSDTrainer,
    SelfDistillationConfig,
    SelfDistillationTrainer,
)
from trl_opsd.serving import sampler
from trl_opsd.trainer.loss import SelfDistillationLoss


def letter_reward(completions, **kwargs):
    return [float(sum(map(ord, completion[0]["content"]))) for completion in completions]


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: First number.
        b: Second number.

    Returns:
        Their sum.
    """
    return a + b


class PeerHint:
    """Shows the teacher its siblings; a rollout without siblings has no context."""

    columns = ()
    seen: list = []  # noqa: RUF012

    def teacher_messages(self, row, rollouts):
        if rollouts is not None:
            self.seen.append(rollouts)
        if rollouts is None or rollouts.index == 0:
            return None
        return [*row["prompt"], {"role": "user", "content": "Peer: " + rollouts.texts[0]}]


class NoContext:
    columns = ()

    def teacher_messages(self, row, rollouts):
        return None


@pytest.fixture
def make_trainer(tokenizer, model, dataset, training_args):
    def make(trainer_class=SelfDistillationTrainer, **settings):
        arguments = {
            "model": model,
            "train_dataset": dataset,
            "processing_class": tokenizer,
            **{
                name: settings.pop(name)
                for name in ("model", "train_dataset", "eval_dataset", "reward_funcs", "peft_config", "rollout_func")
                if name in settings
            },
        }
        args = trainer_class.config_class(**{**training_args, **settings})
        return trainer_class(args=args, **arguments)

    return make


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    ("trainer_class", "config_class"),
    [(GRPOTrainer, GRPOConfig), (OPSDTrainer, OPSDConfig), (OPSDCTrainer, OPSDCConfig)],
)
def test_grpo_script_with_two_names_changed(trainer_class, config_class, tokenizer, model, dataset, training_args):
    config = config_class(
        **training_args, num_generations=4, beta=0.04, scale_rewards="batch", log_completions=False, temperature=0.9
    )
    trainer = trainer_class(
        model=model,
        reward_funcs=[letter_reward],
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(logged(trainer, "rewards/letter_reward/mean")) == 2
    assert all(math.isfinite(value) for value in logged(trainer, "loss") + logged(trainer, "kl"))
    assert (config_class is GRPOConfig) != bool(logged(trainer, "distillation_loss"))


def test_tools_are_in_both_prompts(training_args, dataset):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = qwen3_chat_template
    trainer = OPSDTrainer(
        model=make_model(tokenizer),
        args=OPSDConfig(**training_args, num_generations=4),
        reward_funcs=letter_reward,
        train_dataset=dataset,
        processing_class=tokenizer,
        tools=[add],
    )
    student, teacher = (tokenizer.decode(ids) for ids in trainer.preview_prompts())
    for prompt in (student, teacher):
        assert '"name": "add"' in prompt


def test_metrics_without_rewards(make_trainer):
    trainer = make_trainer(OPSDTrainer, gradient_accumulation_steps=2)
    trainer.train()
    entry = trainer.state.log_history[0]
    expected = (
        "loss",
        "grad_norm",
        "distillation_loss",
        "entropy",
        "teacher_entropy",
        "entropy_gap",
        "teacher_advantage",
        "top_k_overlap",
        "student_mass_on_teacher_top_k",
        "clipped_share",
        "clipped_mass",
        "skipped_token_rate",
        "skipped_steps/total",
        "teacher_prompts/mean_length",
        "teacher_prompts/max_length",
        "context_rate",
        "empty_completion_rate",
        "num_generated_tokens",
        "num_tokens",
        "completions/mean_length",
        "completions/clipped_ratio",
    )
    for name in expected:
        assert math.isfinite(entry[name]), name
    assert not [name for name in entry if "reward" in name]
    assert entry["entropy_gap"] == pytest.approx(entry["entropy"] - entry["teacher_entropy"], abs=1e-5)
    tokens = [8 * entry["completions/mean_length"] for entry in trainer.state.log_history[:2]]
    assert logged(trainer, "num_generated_tokens") == pytest.approx([tokens[0], sum(tokens)])


def test_evaluation_and_streaming(make_trainer, dataset):
    trainer = make_trainer(
        OPSDTrainer,
        train_dataset=dataset.to_iterable_dataset(),
        eval_dataset=dataset.select(range(4)),
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    assert len(logged(trainer, "eval_loss")) == 2
    assert all(math.isfinite(value) for value in logged(trainer, "eval_distillation_loss"))
    assert not [name for entry in trainer.state.log_history for name in entry if "reward" in name]


def test_plain_prompts_with_a_bos_token(make_trainer, dataset):
    tokenizer = make_tokenizer(bos_token="<s>")
    rows = Dataset.from_list([{**row, "prompt": row["prompt"][0]["content"]} for row in dataset])
    args = {"train_dataset": rows, "model": make_model(tokenizer)}
    trainer = make_trainer(OPSDTrainer, **args)
    trainer = OPSDTrainer(args=trainer.args, processing_class=tokenizer, **args)
    for ids in trainer.preview_prompts():
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
    trainer.train()
    assert math.isfinite(logged(trainer, "loss")[0])


def test_peers_reach_the_context_and_rows_without_one_are_masked(make_trainer, monkeypatch):
    monkeypatch.setitem(sys.modules, "peer_hint", sys.modules[__name__])
    PeerHint.seen.clear()
    trainer = make_trainer(
        privileged_context="peer_hint.PeerHint", num_generations=2, reward_funcs=letter_reward, max_steps=1
    )
    trainer.train()
    groups = PeerHint.seen
    assert [group.index for group in groups] == [0, 1, 0, 1]
    assert groups[0].texts == groups[1].texts != groups[2].texts
    assert groups[0].rewards == letter_reward([[{"content": text}] for text in groups[0].texts])
    assert logged(trainer, "context_rate") == [0.5]


def test_batches_without_any_context_neither_crash_nor_train(make_trainer, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "no_context", sys.modules[__name__])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(privileged_context="no_context.NoContext", weight_decay=0.0, loss_type="dapo")
    trainer.train()
    assert logged(trainer, "context_rate") == [0.0, 0.0]
    assert not logged(trainer, "entropy")
    assert logged(trainer, "loss") == [0.0, 0.0]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(before[name], value)


def test_context_gates_the_loss_of_its_row_only(make_trainer, dataset):
    """Overlong teacher prompts are skipped and counted; the other rows train as if nothing was there."""
    rows = list(dataset.select(range(4)))
    rows[2] = {**rows[2], "solution": "far too long " * 40}
    trainer = make_trainer(
        max_teacher_prompt_length=600, overlong_teacher_prompt="skip", train_dataset=Dataset.from_list(rows)
    )
    batch = trainer._generate_and_score_completions(rows)
    kept = batch["divergence_mask"].sum(1) > 0
    assert kept.tolist() == [True, True, False, True]
    assert batch["num_divergence_tokens"] == batch["divergence_mask"].sum()
    trainer.statistics["train"].reduce(trainer.accelerator.gather)
    values = trainer.statistics["train"].take()
    lengths = batch["teacher_prompt_mask"].sum(1)[kept].float()
    assert values["context_rate"] == 0.75
    assert values["teacher_prompts/mean_length"] == pytest.approx(lengths.mean().item())
    assert values["teacher_prompts/max_length"] == lengths.max()


def test_empty_rollouts_are_skipped_and_counted(make_trainer, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def rollout(prompts, trainer):
        completions = [[], [10, 11, 12], [], [13]][: len(prompts)]
        return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": completions, "logprobs": None}

    trainer = make_trainer(rollout_func=rollout)
    trainer.train()
    assert logged(trainer, "empty_completion_rate") == [0.5, 0.5]
    assert logged(trainer, "context_rate") == [1.0, 1.0]
    assert logged(trainer, "num_generated_tokens") == [4.0, 8.0]
    assert all(math.isfinite(value) and value > 0 for value in logged(trainer, "loss"))


def test_empty_generations_are_skipped_and_counted(make_trainer, monkeypatch):
    original = GRPOTrainer._generate_single_turn

    def first_is_empty(self, *args, **kwargs):
        completion_ids, logprobs = original(self, *args, **kwargs)
        return [[], *completion_ids[1:]], logprobs

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", first_is_empty)
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert logged(trainer, "empty_completion_rate") == [0.25]
    assert math.isfinite(logged(trainer, "loss")[0])


def test_teacher_without_a_finite_score_is_skipped_and_counted(make_trainer, model):
    trainer = make_trainer(teacher="initial", max_steps=1)
    with trainer.teacher.weights(model) as teacher:
        teacher.lm_head.weight.data[5] = float("nan")
    trainer.train()
    assert logged(trainer, "skipped_token_rate") == [1.0]
    assert logged(trainer, "loss") == [0.0]
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


def test_step_with_a_gradient_that_is_not_finite_is_skipped(make_trainer, model):
    trainer = make_trainer(max_steps=3)
    calls = []

    def poison(gradient):
        calls.append(1)
        return gradient * float("nan") if len(calls) == 2 else gradient

    model.model.layers[0].mlp.up_proj.weight.register_hook(poison)
    trainer.train()
    assert logged(trainer, "skipped_steps/total") == [0, 1, 1]
    assert trainer.state.global_step == 3
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


def test_negative_clipped_loss_is_announced(make_trainer):
    with pytest.warns(UserWarning, match="no divergence any more"):
        make_trainer(divergence_clip=1e-6, max_steps=1).train()


def test_schedule_of_a_metric_that_nothing_measures_is_announced(make_trainer):
    gates = {
        name: {"kind": "hysteresis", "value": 1.0, "metric": metric}
        for name, metric in (("divergence_coef", "teacher_entrpy"), ("likelihood_coef", "teacher_entropy"))
    }
    trainer = make_trainer(schedules=gates, likelihood_coef=1.0, max_steps=2)
    with pytest.warns(UserWarning, match=r"follows the metric") as caught:
        trainer.train()
    [message] = [str(warning.message) for warning in caught if "follows the metric" in str(warning.message)]
    assert message.startswith("`schedules['divergence_coef']` follows the metric `teacher_entrpy`")
    assert message.endswith("Did you mean `teacher_entropy`?")


def test_policy_loss_is_added_with_its_weight(make_trainer, dataset):
    rows = [row for row in dataset.select(range(2)) for _ in range(2)]
    trainer = make_trainer(
        reward_funcs=letter_reward,
        num_generations=2,
        policy_loss_coef=1.0,
        beta=0.1,
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
    )
    trainer.current_gradient_accumulation_steps = 1
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # away from the reference model
            parameter.data.fill_(0.1)
    batch = trainer._generate_and_score_completions(rows)
    assert batch["advantages"].abs().sum() > 0

    def gradient(compute_loss, batch=batch):
        trainer.model.zero_grad()
        compute_loss(trainer.model, batch).backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])

    def policy_loss(model, batch):
        return GRPOTrainer._compute_loss(trainer, model, batch)

    gradients = {}
    for coefficient in (0.0, 0.5, 1.0):
        trainer.signals.coefficients["policy_loss_coef"] = coefficient
        gradients[coefficient] = gradient(trainer._compute_loss)
    trainer.grpo_loss.shares_pass = trainer.grpo_loss.takes_part = False
    divergence = gradient(trainer._compute_loss)
    # Without advantages, GRPO's loss is its penalty on the distance to the reference model
    penalty = gradient(policy_loss, {**batch, "advantages": 0 * batch["advantages"]})
    advantage = gradient(policy_loss) - penalty
    assert penalty.abs().max() > 1e-4
    assert advantage.abs().max() > 1e-4
    for coefficient, value in gradients.items():
        torch.testing.assert_close(value, divergence + penalty + coefficient * advantage, rtol=1e-4, atol=1e-6)


def test_policy_loss_needs_rewards(make_trainer):
    with pytest.raises(ValueError, match="needs `reward_funcs`"):
        make_trainer(num_generations=2, policy_loss_coef=1.0)


class TestOffPolicy:
    @pytest.fixture
    def rows(self, dataset):
        return dataset.add_column("completion", [f"It is {row['answer']}." for row in dataset])

    @pytest.mark.parametrize(("lmbda", "expected"), [(0.0, 4), (0.5, 2), (0.75, 1)])
    def test_share_of_dataset_completions(self, make_trainer, rows, lmbda, expected):
        trainer = make_trainer(
            completions="dataset", completions_kwargs={"lmbda": lmbda}, train_dataset=rows, max_completion_length=16
        )
        batch = trainer._generate_and_score_completions(list(rows.select(range(4))))
        texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
        taken = [text == row["completion"] for text, row in zip(texts, rows, strict=False)]
        assert sum(taken) == expected
        eos = (batch["completion_ids"] == trainer.eos_token_ids[0]) & batch["completion_mask"].bool()
        assert eos.any(1)[torch.tensor(taken)].all()
        sampled = batch["completion_mask"].sum(1)[~torch.tensor(taken)].sum()
        assert trainer._num_generated_tokens == sampled

    def test_trains_and_evaluates_on_policy(self, make_trainer, rows):
        trainer = make_trainer(
            completions="dataset",
            completions_kwargs={"lmbda": 0.25},
            train_dataset=rows,
            eval_dataset=rows.select(range(4)),
            max_completion_length=16,
        )
        trainer.train()
        assert all(math.isfinite(value) for value in logged(trainer, "loss"))
        trainer.model.eval()
        batch = trainer._generate_and_score_completions(list(rows.select(range(4))))
        texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
        assert not set(texts) & set(rows["completion"])

    def test_completion_over_budget_is_refused(self, make_trainer, rows):
        trainer = make_trainer(completions="dataset", train_dataset=rows, max_completion_length=4)
        with pytest.raises(ValueError, match="It is never truncated"):
            trainer.train()

    def test_completion_column_is_required(self, make_trainer):
        with pytest.raises(ValueError, match="completion"):
            make_trainer(completions="dataset")

    def test_samples_of_the_teacher(self, make_trainer, dataset):
        """A teacher that can only say one token gives completions of that token, and the policy is put back."""
        trainer = make_trainer(completions="teacher", completions_kwargs={"lmbda": 0.5}, top_k=1)
        token = trainer.processing_class.convert_tokens_to_ids("z")
        with trainer.teacher.weights(trainer.model) as teacher:
            teacher.lm_head.weight.data.zero_()
            teacher.lm_head.bias = torch.nn.Parameter(torch.zeros(len(trainer.processing_class)))
            teacher.lm_head.bias.data[token] = 100.0
        policy = trainer.model_wrapped
        batch = trainer._generate_and_score_completions(list(dataset.select(range(4))))
        from_teacher = (batch["completion_ids"] == token).all(1)
        assert from_teacher.sum() == 2
        assert trainer.model_wrapped is policy
        assert trainer._num_generated_tokens == batch["completion_mask"].sum()


@pytest.mark.parametrize(
    ("trainer_class", "paper", "tag"),
    [(OPSDTrainer, "2601.18734", "opsd"), (OPSDCTrainer, "2603.05433", "opsdc")],
)
def test_model_card_cites_the_paper(make_trainer, trainer_class, paper, tag):
    trainer = make_trainer(trainer_class)
    trainer.create_model_card("tiny")
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert f"huggingface.co/papers/{paper}" in card
    assert trainer._name in card
    assert f"- {tag}" in card
    assert trainer._paper["title"] in card


def of_the_answer(completions, answer, log_extra, log_metric, **kwargs):
    """Reads a column of the data, and logs one of its own and a number."""
    log_extra("half of the answer", [int(its) / 2 for its in answer])
    log_metric("largest answer", max(map(int, answer)))
    return [float(its) for its in answer]


def test_log_completions(make_trainer):
    trainer = make_trainer(
        log_completions=True, max_steps=1, reward_funcs=of_the_answer, policy_loss_coef=1.0, num_generations=2
    )
    trainer.train()
    [file] = (Path(trainer.args.output_dir) / "completions").glob("*.parquet")
    table = Dataset.from_parquet(str(file))
    assert table["half of the answer"] == [reward / 2 for reward in table["of_the_answer"]]
    assert [entry["largest answer"] for entry in trainer.state.log_history[:1]] == [max(table["of_the_answer"])]


def test_names_alone_are_loaded(model_path, tokenizer, dataset, training_args, tmp_path, monkeypatch):
    """Policy, reward model and their tokenizers; and settings, at their defaults."""
    judge = Qwen3ForSequenceClassification(make_model(tokenizer, num_labels=1).config)
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    args = SelfDistillationConfig(**training_args, num_generations=2, policy_loss_coef=1.0)
    trainer = SelfDistillationTrainer(model_path, str(tmp_path / "judge"), args, dataset)
    trainer.train()
    assert "rewards/judge/mean" in trainer.state.log_history[0]

    @dataclass
    class Config(SelfDistillationConfig, defaults={name: training_args[name] for name in ("use_cpu", "bf16")}):
        pass

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SelfDistillationTrainer, "config_class", Config)
    trainer = SelfDistillationTrainer(model_path, train_dataset=dataset)
    assert Path(trainer.args.output_dir).name == f"{Path(model_path).name}-Self-Distillation"
    assert trainer.processing_class.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("settings", [{}, {"divergence_coef": 0.0, "likelihood_coef": 1.0}])
def test_sampler_is_compared_with_the_weights_it_sampled_with(make_trainer, dataset, monkeypatch, settings):
    """An evaluation between two generations does not make the rollouts of an earlier step fresh."""

    def rollout(prompts, trainer):
        ids = [[7, 8, 9] for _ in prompts]
        logprobs = [[-1.0, -2.0, float("nan")] for _ in prompts]
        return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": ids, "logprobs": logprobs}

    trainer = make_trainer(
        rollout_func=rollout,
        eval_dataset=dataset.select(range(4)),
        eval_strategy="steps",
        eval_steps=1,
        steps_per_generation=2,
        max_steps=4,
        **settings,
    )
    monkeypatch.setattr(type(trainer.args), "sampler_is_comparable", True)  # as with vLLM
    outputs = []
    loss = SelfDistillationLoss.__call__

    def recording(self, *args):
        result = loss(self, *args)
        if torch.is_grad_enabled():
            outputs.append(result.log_probs)
        return result

    monkeypatch.setattr(SelfDistillationLoss, "__call__", recording)
    trainer.train()

    name = "sampling/sampling_logp_difference"
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [f"{name}/mean" in entry for entry in steps] == [True, False, True, False]
    for entry, log_probs in zip(steps[::2], outputs[::2], strict=True):
        difference = (log_probs.view(-1, 3)[:, :2] - torch.tensor([-1.0, -2.0])).abs()
        assert entry[f"{name}/mean"] == pytest.approx(difference.mean().item(), rel=1e-5)
        assert entry[f"{name}/max"] == pytest.approx(difference.max().item(), rel=1e-5)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert all(f"eval_{name}/max" in entry for entry in evaluations)


def test_each_process_measures_its_share_of_the_prompts(make_trainer, dataset, monkeypatch):
    """The student's prompts, for an engine that has to take them."""
    rows = [{**row, "prompt": [{"role": "user", "content": "What? " * (1 + i)}]} for i, row in enumerate(dataset)]
    trainer = make_trainer(train_dataset=Dataset.from_list(rows))
    lengths = [len(ids) for ids in trainer._tokenize_prompts([row["prompt"] for row in rows])[0]]
    measured = []

    def tokenize(prompts):
        measured.extend(prompts)
        return trainer._tokenize_prompts(prompts)[0]

    assert sampler.longest_prompt(trainer.train_dataset, tokenize, trainer.accelerator) == max(lengths)
    measured.clear()
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(sampler, "gather_object", lambda own: [*own, 7])
    assert sampler.longest_prompt(trainer.train_dataset, tokenize, trainer.accelerator) == max(lengths[::2])
    assert len(measured) == len(rows) // 2
