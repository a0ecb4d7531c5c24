"""Which rows go through the network together changes the cost of a step, never its result."""

from itertools import chain

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import make_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_opsd import OPSDConfig, OPSDTrainer


LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
SKIP_OVERLONG = {"max_teacher_prompt_length": 600, "overlong_teacher_prompt": "skip", "shuffle_dataset": False}
LOGGED = (
    "loss",
    "distillation_loss",
    "entropy",
    "teacher_entropy",
    "teacher_advantage",
    "clipped_share",
    "skipped_token_rate",
)


def rollout(prompts, trainer):
    """Completions that differ between the rollouts of a prompt, in length too."""
    text = "".join(prompt[-1]["content"] for prompt in prompts)
    ids = trainer.processing_class(text, add_special_tokens=False)["input_ids"]
    completions = [ids[7 * i : 7 * i + 2 + (5 * i + sum(ids)) % 7] for i in range(len(prompts))]
    return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": completions, "logprobs": None}


@pytest.fixture(autouse=True)
def _quiet_rollout_func(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args):
    def make(model=None, peft_config=None, train_dataset=dataset, eval_dataset=None, **settings):
        defaults = {"optim": "sgd", "learning_rate": 0.1, "divergence_clip": 0.05}
        return OPSDTrainer(
            model=make_model(tokenizer) if model is None else model,
            args=OPSDConfig(**{**training_args, **defaults, **settings}),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            rollout_func=rollout,
        )

    return make


def assert_same_training(one, other):
    """Train both; same weights, same log."""
    start = {name: value.clone() for name, value in one.model.state_dict().items()}
    for trainer in (one, other):
        torch.manual_seed(0)
        trainer.train()
    for first, second in zip(one.state.log_history, other.state.log_history, strict=True):
        assert first.keys() == second.keys()
        for name in LOGGED:
            for key in {name, f"eval_{name}"} & first.keys():
                assert second[key] == pytest.approx(first[key], rel=1e-5, abs=1e-6), key
    weights = other.model.state_dict()
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-6)
    assert any((start[name] - value).abs().max() > 1e-4 for name, value in weights.items())


class TestTokenBudget:
    @pytest.mark.parametrize("peft_config", [None, LORA])
    @pytest.mark.parametrize(
        "settings",
        [
            {"loss_type": "grpo"},
            {"loss_type": "dapo", "num_generations": 4},
            {"loss_type": "bnpo", "gradient_accumulation_steps": 2},
            {"loss_type": "dr_grpo", "num_generations": 2, "num_iterations": 2},
            {"loss_type": "grpo", "num_generations": 2, "pad_to_multiple_of": 16, "gradient_accumulation_steps": 2},
        ],
        ids=str,
    )
    def test_training_is_the_same(self, make_trainer, peft_config, settings):
        assert_same_training(
            make_trainer(peft_config=peft_config, **settings),
            make_trainer(peft_config=peft_config, **settings, max_tokens_per_microbatch=1500),
        )

    def test_evaluation_is_the_same(self, make_trainer, dataset):
        settings = {"eval_dataset": dataset.select(range(8)), "eval_strategy": "steps", "eval_steps": 1}
        assert_same_training(make_trainer(**settings), make_trainer(**settings, max_tokens_per_microbatch=1500))

    def test_passes_keep_to_the_budget_and_a_longer_row_is_alone(self, make_trainer, dataset):
        rows = [dict(row) for row in dataset.select(range(4))]
        rows[2]["solution"] = "make " * 300
        trainer = make_trainer(
            train_dataset=Dataset.from_list(rows), teacher="live", max_tokens_per_microbatch=1200, max_steps=1
        )
        shapes = []
        trainer.model.get_input_embeddings().register_forward_pre_hook(
            lambda module, args: shapes.append((torch.is_grad_enabled(), tuple(args[0].shape)))
        )
        trainer.train()
        students = [shape for has_gradient, shape in shapes if has_gradient]
        teachers = [shape for has_gradient, shape in shapes if not has_gradient]
        assert sum(shape[0] for shape in students) == sum(shape[0] for shape in teachers) == 4
        assert teachers[0][0] == students[0][0] == 1
        assert teachers[0][1] > 1500
        for num_rows, width in students[1:] + teachers[1:]:
            assert num_rows * width <= 1200
        assert len(students) == 3

    def test_passes_keep_all_that_belongs_to_a_row(self, make_trainer, dataset):
        """Also what only a sampler or a method to come puts into the batch."""
        trainer = make_trainer(max_tokens_per_microbatch=1)
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer._generate_and_score_completions(list(dataset.select(range(4))))
        shape = batch["completion_ids"].shape
        own = {
            "sampling_per_token_logps": torch.rand(shape),
            "importance_sampling_ratio": torch.rand(len(batch["completion_ids"]), 1),
            "a_stream_to_come": torch.rand(shape),
            "a_number_to_come": torch.rand(len(batch["completion_ids"])),
            "pictures_to_come": torch.rand(len(batch["completion_ids"]), 3, 2, 2),
        }
        shared = {"a_scalar": torch.tensor(2.0), "a_setting": "both"}
        whole = {**batch, **own, **shared, "student_mask": batch["divergence_mask"]}
        *_, passes = trainer.loss(trainer.model, whole, 1, 1)
        assert len(passes) == 4
        for rows in passes:
            assert whole.keys() <= rows.keys()
            [row] = (whole["a_number_to_come"] == rows["a_number_to_come"]).nonzero()
            assert not rows["likelihood_mask"].any()  # of a term that is off
            for name, value in whole.items():
                if name == "likelihood_mask":
                    continue
                if isinstance(value, torch.Tensor) and value.ndim:
                    torch.testing.assert_close(rows[name], value[row], rtol=0, atol=0, equal_nan=True, msg=name)
                else:
                    assert rows[name] is value

    def test_the_sampler_is_compared_over_all_passes(self, make_trainer, dataset, monkeypatch):
        differences = []
        for max_tokens in (None, 1500):
            trainer = make_trainer(max_tokens_per_microbatch=max_tokens)
            trainer.current_gradient_accumulation_steps = 1
            monkeypatch.setattr(type(trainer.args), "sampler_is_comparable", True)  # as with vLLM
            batch = trainer._generate_and_score_completions(list(dataset.select(range(4))))
            batch["sampling_per_token_logps"] = -torch.arange(batch["divergence_mask"].numel()).view_as(
                batch["divergence_mask"]
            )
            trainer._compute_loss(trainer.model, batch)
            values = trainer.statistics["train"].take()
            differences.append([values[f"sampling/sampling_logp_difference/{name}"] for name in ("mean", "max")])
        assert differences[1] == pytest.approx(differences[0], rel=1e-5)

    def test_gradients_are_synchronised_once_per_optimizer_step(self, make_trainer, monkeypatch):
        trainer = make_trainer(gradient_accumulation_steps=2, max_tokens_per_microbatch=1, max_steps=2)
        flags = []
        original = trainer.accelerator.backward

        def backward(loss, **kwargs):
            flags.append(trainer.accelerator.sync_gradients)
            original(loss, **kwargs)

        monkeypatch.setattr(trainer.accelerator, "backward", backward)
        trainer.train()
        assert flags == [*[False] * 7, True] * 2

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_tokens_per_microbatch": 0}, "`max_tokens_per_microbatch` must be at least 1"),
            ({"max_tokens_per_microbatch": 9, "entropy_coef": 0.1}, "cannot be combined with `entropy_coef=0.1`"),
        ],
    )
    def test_refused(self, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            OPSDConfig(str(tmp_path), use_cpu=True, **settings)

    def test_auxiliary_loss_is_refused(self, make_trainer, tokenizer):
        config = Qwen3MoeConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, moe_intermediate_size=16,
            num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, num_experts=2, num_experts_per_tok=1,
        )  # fmt: skip
        with pytest.raises(ValueError, match=r"`max_tokens_per_microbatch=9` .*`router_aux_loss_coef=0.001`"):
            make_trainer(Qwen3MoeForCausalLM(config), max_tokens_per_microbatch=9)


class TestGroups:
    @staticmethod
    def buffered(trainer, rows, keep_groups):
        """The rows of each buffered micro-batch, as pairs of teacher prompt and completion."""
        trainer.loss.networks.can_share_prompts = keep_groups
        trainer._buffered_inputs = None
        trainer._step = 0
        trainer.model.train()
        torch.manual_seed(0)
        inputs = trainer._prepare_inputs(rows)
        assert inputs is trainer._buffered_inputs[0]
        return [
            list(
                zip(batch["teacher_prompt_groups"].tolist(), map(tuple, batch["completion_ids"].tolist()), strict=True)
            )
            for batch in trainer._buffered_inputs
        ]

    @pytest.mark.parametrize(("accumulation", "window"), [(8, 8), (2, 2), (12, 4)])
    def test_every_optimizer_step_keeps_its_rows(self, make_trainer, dataset, accumulation, window):
        trainer = make_trainer(
            num_generations=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=8,
        )
        rows = [row for row in dataset.select(range(4)) for _ in range(4)]
        shuffled, kept = (self.buffered(trainer, rows, keep) for keep in (False, True))
        assert shuffled != kept
        for start in range(0, 8, window):
            before, after = (list(chain(*batches[start : start + window])) for batches in (shuffled, kept))
            assert sorted(before) == sorted(after)
            groups = [group for group, _ in after]
            assert groups == sorted(groups, key=groups.index)
        if window == 8:
            assert all(len({group for group, _ in batch}) == 1 for batch in kept)

    def test_one_rollout_per_prompt_is_left_as_shuffled(self, make_trainer, dataset):
        trainer = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=4)
        rows = [dataset[index] for index in (0, 1, 2, 3, 0, 1, 2, 3)]
        assert self.buffered(trainer, rows, True) == self.buffered(trainer, rows, False)

    @pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
    def test_training_is_the_same(self, make_trainer, loss_type):
        """All that the shuffle decides, which rows an optimizer step has, stays."""
        settings = {"loss_type": loss_type, "num_generations": 2, "per_device_train_batch_size": 2}
        trainers = [make_trainer(**settings, gradient_accumulation_steps=4) for _ in range(2)]
        trainers[1].loss.networks.can_share_prompts = False
        weights = []
        for trainer in trainers:
            torch.manual_seed(0)
            trainer.train()
            weights.append(trainer.model.state_dict())
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, rtol=1e-6, atol=1e-6)


class TestRowsWithoutAContext:
    @pytest.fixture
    def rows(self, dataset):
        """Of eight rows, the second half of each four is too long for its teacher."""
        return Dataset.from_list(
            [{**dataset[i], "solution": "far too long " * 60 if i % 4 > 1 else "5"} for i in range(8)]
        )

    @pytest.mark.parametrize("settings", [{}, {"max_tokens_per_microbatch": 600}], ids=str)
    @pytest.mark.parametrize("peft_config", [None, LORA])
    def test_go_through_no_backbone_and_change_nothing(self, make_trainer, rows, peft_config, settings, monkeypatch):
        settings = {"per_device_train_batch_size": 8, "teacher": "live", "loss_type": "grpo", **settings}
        trainers = [make_trainer(None, peft_config, rows, **SKIP_OVERLONG, **settings) for _ in range(2)]
        monkeypatch.setattr(trainers[1].loss.networks, "passes", lambda inputs: [inputs])
        num_rows = []
        for trainer in trainers:
            num_rows.append([])
            trainer.model.get_input_embeddings().register_forward_pre_hook(
                lambda module, args, counts=num_rows[-1]: counts.append(len(args[0]))
            )
        assert_same_training(*trainers)
        steps = 2
        assert [sum(counts) for counts in num_rows] == [steps * (4 + 4), steps * (4 + 8)]  # of teacher and student

    def test_process_without_rows_runs_as_many_passes(self, make_trainer, rows, monkeypatch):
        """Here one process has two rows and the other none, and each row is a pass."""
        settings = {"per_device_train_batch_size": 2, "num_generations": 1, "max_tokens_per_microbatch": 1}
        trainer = make_trainer(None, None, rows, **SKIP_OVERLONG, **settings)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        batches = [trainer._generate_and_score_completions([rows[i] for i in part]) for part in ((0, 1), (2, 3))]
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
        monkeypatch.setattr(trainer.accelerator, "gather", lambda number: torch.tensor([1, 2]))
        with_rows, without = (
            trainer.loss.networks.passes({**batch, "student_mask": batch["divergence_mask"]}) for batch in batches
        )
        assert (
            [len(rows["divergence_mask"]) for rows in with_rows]
            == [len(rows["divergence_mask"]) for rows in without]
            == [1, 1]
        )
        assert all(rows["divergence_mask"].any() for rows in with_rows)
        assert not any(rows["divergence_mask"].any() for rows in without)
