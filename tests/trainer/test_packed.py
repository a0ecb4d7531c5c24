"""With flash attention, both passes read rows without padding, and training is the same."""

import pytest
import torch
from flash_attention import FlashAttention, use_flash_attention
from peft import LoraConfig
from tiny import make_model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from trl_opsd import OPSDConfig, OPSDTrainer


READER = {True: "student", False: "teacher"}
LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])


def rollout(prompts, trainer):
    """Completions of very different lengths."""
    completions = [[10 + i, 11, *range(20, 20 + [0, 6, 1, 2][i % 4])] for i, _ in enumerate(prompts)]
    return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": completions, "logprobs": None}


@pytest.fixture(autouse=True)
def _quiet_rollout_func(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(autouse=True)
def flash(monkeypatch):
    flash = FlashAttention()
    flash.install(monkeypatch)
    return flash


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args):
    def make(flash=True, peft_config=None, reward_funcs=None, **settings):
        model = make_model(tokenizer)
        trainer = OPSDTrainer(
            model=use_flash_attention(model) if flash else model,
            args=OPSDConfig(
                **{**training_args, "optim": "sgd", "learning_rate": 0.1, "divergence_clip": 0.05, **settings}
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            reward_funcs=reward_funcs,
            rollout_func=rollout,
        )
        trainer.read = []  # by whom, and the shape of the token ids
        with trainer.teacher.weights(trainer.model) as module:
            embeddings = {trainer.model.get_input_embeddings(), module.get_input_embeddings()}
        for embedding in embeddings:
            embedding.register_forward_pre_hook(
                lambda _, args: trainer.read.append((READER[torch.is_grad_enabled()], args[0].shape))
            )
        return trainer

    return make


def train(trainer):
    torch.manual_seed(0)
    trainer.train()
    return trainer


def assert_same_training(one, other):
    start = {name: value.clone() for name, value in one.model.state_dict().items()}
    for trainer in (one, other):
        train(trainer)
    for first, second in zip(one.state.log_history, other.state.log_history, strict=True):
        assert first.keys() == second.keys()
        for name in {"loss", "distillation_loss", "entropy", "teacher_entropy", "teacher_advantage"} & first.keys():
            assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-6), name
    weights = other.model.state_dict()
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
    assert any((start[name] - value).abs().max() > 1e-4 for name, value in weights.items())


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True},
        {"max_tokens_per_microbatch": 900, "gradient_accumulation_steps": 2},
        {"num_generations": 4, "teacher": "live"},
        {"num_generations": 2, "policy_loss_coef": 0.5, "num_iterations": 2},
    ],
    ids=str,
)
def test_training_is_the_same(make_trainer, peft_config, settings, flash):
    if "policy_loss_coef" in settings:
        settings = {**settings, "reward_funcs": lambda completions, **_: list(map(float, range(len(completions))))}
        settings["beta"] = 0.1 if peft_config else 0.0  # without an adapter, the reference would be loaded by name
    packed = make_trainer(peft_config=peft_config, **settings)
    assert_same_training(make_trainer(flash=False, peft_config=peft_config, **settings), packed)
    assert flash.boundaries


def test_passes_read_tokens_only(make_trainer):
    packed, padded = (train(make_trainer(flash, max_steps=1)) for flash in (True, False))
    assert [who for who, _ in packed.read] == [who for who, _ in padded.read] == ["teacher", "student"]
    assert all(shape[0] == 4 for _, shape in padded.read)
    for (_, (num_rows, num_tokens)), (_, shape) in zip(packed.read, padded.read, strict=True):
        assert num_rows == 1
        assert num_tokens < shape.numel()


def test_model_that_takes_rows_for_one_sequence_is_refused(make_trainer, monkeypatch):
    forward = Qwen3Attention.forward

    def without_boundaries(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **_):
        return forward(self, hidden_states, position_embeddings, attention_mask, past_key_values)

    monkeypatch.setattr(Qwen3Attention, "forward", without_boundaries)
    make_trainer(flash=False)
    with pytest.raises(ValueError, match="reads rows without padding between them otherwise than apart"):
        make_trainer()


class TestBudget:
    @pytest.fixture
    def longest_two(self, make_trainer):
        """Tokens of the two rows for which the teacher reads most."""
        alone = train(make_trainer(flash=False, max_steps=1, max_tokens_per_microbatch=1)).read
        return sum(sorted(shape.numel() for who, shape in alone if who == "teacher")[-2:])

    def test_counts_tokens(self, make_trainer, longest_two):
        settings = {"max_steps": 1, "max_tokens_per_microbatch": longest_two}
        packed, padded = (train(make_trainer(flash, **settings)).read for flash in (True, False))
        assert [who for who, _ in packed] == ["teacher", "student"] * 2
        assert packed[0][1].numel() == longest_two
        assert packed[2][1].numel() <= longest_two
        assert len(padded) > len(packed)

    def test_counts_padding_that_is_asked_for(self, make_trainer, longest_two, flash):
        settings = {"pad_to_multiple_of": 32, "max_tokens_per_microbatch": longest_two}
        trainer = train(make_trainer(max_steps=1, **settings))
        assert flash.boundaries
        assert all(shape[1] % 32 == 0 and shape.numel() <= longest_two for _, shape in trainer.read)

    def test_counts_padding_where_the_teacher_pads(self, make_trainer, longest_two, model_path):
        teacher = {"teacher": "external", "teacher_model_name_or_path": model_path}
        trainer = train(make_trainer(max_steps=1, max_tokens_per_microbatch=longest_two, **teacher))
        assert len(trainer.read) > 4
        assert all(shape.numel() <= longest_two for _, shape in trainer.read)


class TestSharedPrompts:
    @staticmethod
    def tokens_read(trainer, completion_lengths):
        """Tokens that the teacher reads for four rollouts of one prompt of 100 tokens."""
        width = max(completion_lengths)
        ids = torch.randint(10, 50, (4, width))
        ids = torch.cat([torch.randint(10, 50, (1, 100)).expand(4, 100), ids], dim=1)
        mask = torch.ones_like(ids)
        for row, length in enumerate(completion_lengths):
            mask[row, 100 + length :] = 0
        trainer.read.clear()
        with trainer.teacher.weights(trainer.model) as module:
            trainer.loss.networks.teacher_states(module, ids, mask, mask[:, 100:].bool(), torch.zeros(4))
        return sum(shape.numel() for _, shape in trainer.read)

    @pytest.mark.parametrize(
        ("lengths", "packed", "padded"),
        [
            ([60, 60, 60, 60], 100 + 4 * 60, 100 + 4 * 60),
            ([400, 1, 1, 1], 4 * 100 + 403, 100 + 4 * 400),  # sharing pads completions
        ],
    )
    def test_where_fewer_tokens_are_read(self, make_trainer, lengths, packed, padded):
        assert self.tokens_read(make_trainer(), lengths) == packed
        assert self.tokens_read(make_trainer(flash=False), lengths) == padded
