"""A rate is one sum over another, whatever the micro-batches and processes they come from."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import make_model
from trl import GRPOConfig, GRPOTrainer

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer
from trl_opsd.objective import FusedDivergence
from trl_opsd.signal.schedule import SCORED_METRICS
from trl_opsd.trainer.metrics import Metrics, add_divergence, add_policy


def alone(values):
    """The gathering of a single process."""
    return values


class TestMetrics:
    def test_rates_are_no_means_of_means(self):
        metrics = Metrics()
        for total, count in ((3.0, 1), (1.0, 7)):
            metrics.add_rate("a", torch.tensor(total), torch.tensor(count))
        metrics.reduce(alone)
        metrics.add_rate("a", torch.tensor(2.0), torch.tensor(2))
        metrics.reduce(alone)
        assert metrics.take() == {"a": 0.6}
        assert metrics.take() == {}

    def test_what_was_never_counted_is_absent(self):
        metrics = Metrics()
        metrics.add_rate("a", torch.tensor(0.0), torch.tensor(0))
        metrics.add_maximum("b", torch.tensor([]))
        metrics.reduce(alone)
        assert metrics.take() == {}

    def test_processes_are_summed(self):
        others = Metrics()
        others.add_rate("a", torch.tensor(5.0), torch.tensor(3))
        others.add_maximum("b", torch.tensor([9]))
        sent = []
        others.reduce(lambda values: sent.append(values) or values)
        metrics = Metrics()
        metrics.add_rate("a", torch.tensor(1.0), torch.tensor(1))
        metrics.add_maximum("b", torch.tensor([2, 4]))
        metrics.add_maximum("b", torch.tensor([3]))
        metrics.reduce(lambda values: torch.cat([values, *sent]))
        assert metrics.take() == {"a": 1.5, "b": 9.0}


def test_each_statistic_is_averaged_over_the_tokens_it_is_known_for():
    nan = float("nan")
    values = dict.fromkeys(FusedDivergence._fields[1:], torch.tensor([1.0, 2.0, 6.0, 100.0]))
    values["top_k_overlap"] = torch.tensor([nan, 0.5, nan, 100.0])
    values["teacher_log_prob"] = torch.tensor([-float("inf"), 5.0, 10.0, 100.0])
    values["finite"] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    metrics = Metrics()
    add_divergence(metrics, FusedDivergence(torch.tensor(0.0), **values), knows_teacher_entropy=False, clips=False)
    metrics.reduce(alone)
    assert metrics.take() == {
        "distillation_loss": 3.0,
        "entropy": 3.0,
        "teacher_advantage": 3.5,
        "top_k_overlap": 0.5,
        "student_mass_on_teacher_top_k": 3.0,
        "skipped_token_rate": 0.25,
    }


def test_schedules_know_what_comes_from_scores():
    metrics = Metrics()
    output = FusedDivergence(torch.tensor(0.0), **dict.fromkeys(FusedDivergence._fields[1:], torch.ones(2)))
    add_divergence(metrics, output, knows_teacher_entropy=True, clips=True)
    metrics.reduce(alone)
    assert metrics.take().keys() == set(SCORED_METRICS)


def test_step_in_which_nothing_was_measured_has_no_latest():
    metrics = Metrics()
    metrics.add_rate("entropy", torch.tensor(2.0), torch.tensor(1.0))
    metrics.reduce(alone)
    assert metrics.latest == {"entropy": 2.0}
    metrics.reduce(alone)
    assert metrics.latest == {}


def test_every_metric_is_documented_with_its_denominator():
    root = Path(__file__).parents[2]
    table = [
        line for line in (root / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"
    ]
    documented = set()
    for line in table[2:]:
        first = ""
        for name in re.findall(r"`([^`]+)`", line.split("|")[1]):
            first = first if name[0] == "/" else name
            documented.add(first.rpartition("/")[0] + name if name[0] == "/" else name)
    source = "".join(path.read_text(encoding="utf-8") for path in (root / "trl_opsd" / "trainer").glob("*.py"))
    source += (root / "trl_opsd" / "sampling" / "sources.py").read_text(encoding="utf-8")
    logged = set(re.findall(r'add_\w+\("([^"]+)"', source)) | set(re.findall(r'"(completions/\w+)"', source))
    logged |= {f"{term}_row_rate" for term in ("divergence", "likelihood")} | set(SCORED_METRICS)
    assert {"likelihood_loss", "context_rate", "context_samples/truncated_rate", "completions/retry_rate"} <= logged
    assert logged <= documented, logged - documented


def test_means_of_grpo_become_sums():
    metrics = Metrics()
    for kl, clipped, num_tokens in ((1.0, 0.5, 1), (3.0, 0.0, 3)):
        logged = {"kl": [kl], "clip_ratio/low_mean": [clipped], "entropy": [7.0], "policy_loss": [0.2]}
        logged |= {"clip_ratio/low_min": [clipped], "clip_ratio/high_max": [clipped]}
        tokens = torch.tensor([[1] * num_tokens + [0] * (4 - num_tokens)])
        assert add_policy(metrics, logged, tokens, by_sequence=True) == {"policy_loss": [0.2]}
    metrics.reduce(alone)
    assert metrics.take() == {
        "kl": 2.5,
        "clip_ratio/low_mean": 0.25,
        "clip_ratio/low_min": 0.0,
        "clip_ratio/high_max": 0.5,
    }


def word_rollouts(prompts, trainer):
    """Completions whose length depends on the prompt and the place in the batch."""
    ids = [[10 + (7 * index + token) % 40 for token in range(1 + index % 4)] for index in range(len(prompts))]
    return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": ids, "logprobs": None}


def length_reward(completions, **kwargs):
    return [float(len(completion[0]["content"]) % 3) for completion in completions]


class TestLog:
    @pytest.fixture
    def log(self, tokenizer, training_args, monkeypatch):
        monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

        def train(rows, peft_config=None, **settings):
            settings = {"learning_rate": 0.0, "shuffle_dataset": False, "max_steps": 1, **settings}
            trainer = SelfDistillationTrainer(
                model=make_model(tokenizer),
                reward_funcs=length_reward,
                args=SelfDistillationConfig(**{**training_args, **settings}),
                train_dataset=Dataset.from_list(list(rows)),
                processing_class=tokenizer,
                peft_config=peft_config,
                rollout_func=word_rollouts,
            )
            torch.manual_seed(0)
            trainer.train()
            return trainer.state.log_history[0]

        return train

    def test_entropy_is_the_same_with_grpos_loss(self, log, dataset):
        settings = {"num_generations": 4, "distillation_temperature": 0.5, "peft_config": LoraConfig(r=2)}
        without = log(dataset, **settings)
        composed = log(dataset, **settings, policy_loss_coef=1.0, beta=0.1)
        assert composed["entropy"] == pytest.approx(without["entropy"], rel=1e-6)
        assert composed["entropy_gap"] == pytest.approx(composed["entropy"] - composed["teacher_entropy"], abs=1e-5)
        assert "kl" in composed

    def test_entropy_without_a_divergence_is_grpos(self, log, dataset, tokenizer, training_args):
        """Whatever the micro-batches."""
        settings = {"num_generations": 4, "divergence_coef": 0.0, "policy_loss_coef": 1.0, "learning_rate": 0.0}
        split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer = GRPOTrainer(
            make_model(tokenizer),
            reward_funcs=length_reward,
            args=GRPOConfig(**{**training_args, "num_generations": 4, "max_steps": 1, "shuffle_dataset": False}),
            train_dataset=dataset,
            processing_class=tokenizer,
            rollout_func=word_rollouts,
        )
        torch.manual_seed(0)
        trainer.train()
        expected = pytest.approx(trainer.state.log_history[0]["entropy"], rel=1e-4)
        for more in ({}, split, {"max_tokens_per_microbatch": 300}):
            assert log(dataset, **settings, **more)["entropy"] == expected

    def test_micro_batches_without_a_context_do_not_count(self, log, dataset):
        """With one row a micro-batch, half of them score nothing."""
        rows = [{**row, "solution": "far too long " * 60 if index % 2 else "5"} for index, row in enumerate(dataset)]
        settings = {"max_teacher_prompt_length": 600, "overlong_teacher_prompt": "skip"}
        settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        masked = log(rows, **settings)
        whole = log(rows, **settings | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1})
        assert masked["context_rate"] == whole["context_rate"] == 0.5
        for name in ("distillation_loss", "entropy", "teacher_entropy", "teacher_advantage", "top_k_overlap"):
            assert masked[name] == pytest.approx(whole[name], rel=1e-5), name
        assert masked["entropy"] > 2.0

    def test_steps_of_a_window_weigh_by_their_tokens(self, log, dataset):
        one_by_one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
        window = log(dataset, **one_by_one, max_steps=2, logging_steps=2)
        whole = log(dataset)
        for name in ("distillation_loss", "entropy", "teacher_advantage"):
            assert window[name] == pytest.approx(whole[name], rel=1e-5), name

    def test_gate_of_the_divergence_opens(self, tokenizer, dataset, training_args):
        """What it follows is measured by scores as long as it is shut."""
        gate = {"kind": "hysteresis", "value": 0.5, "low": 0.1, "high": 0.1, "warmup_steps": 2}
        settings = {"max_steps": 4, "schedules": {"divergence_coef": gate}, "learning_rate": 1e-3}
        trainer = SelfDistillationTrainer(
            model=make_model(tokenizer),
            args=SelfDistillationConfig(**{**training_args, **settings}),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all("teacher_entropy" in entry for entry in steps)
        assert [entry["grad_norm"] > 0 for entry in steps] == [False, False, True, True]
        assert [entry["schedules/divergence_coef"] for entry in steps] == [0.0, 0.0, 0.5, 0.5]
        assert trainer.signals.coefficients["divergence_coef"] == 0.5
