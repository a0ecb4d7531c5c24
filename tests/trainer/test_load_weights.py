"""Weights come back from a checkpoint whatever names and pieces its files keep them in."""

from pathlib import Path

import pytest
import torch
from placement import place
from tiny import make_model
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.trainer.checkpoints import load_weights


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}


def qwen3_moe(seed, vocab_size=96):
    torch.manual_seed(seed)
    return place(
        Qwen3MoeForCausalLM(
            Qwen3MoeConfig(vocab_size=vocab_size, **SIZES, num_experts=4, moe_intermediate_size=16, head_dim=16)
        )
    )


def mixtral(seed):
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(vocab_size=96, **SIZES, num_local_experts=4))


def deepseek(seed):
    torch.manual_seed(seed)
    config = DeepseekV3Config(
        vocab_size=96, **SIZES, **LATENT, n_routed_experts=4, n_group=1, topk_group=1, moe_intermediate_size=16
    )
    return DeepseekV3ForCausalLM(config)


def assert_equal(model, other):
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("make", [qwen3_moe, mixtral, deepseek])
def test_experts_that_the_file_keeps_apart(make, tmp_path):
    saved, model = make(0), make(1)
    saved.save_pretrained(tmp_path)
    load_weights(tmp_path, model)
    assert_equal(saved, model)


def test_several_dtypes_and_several_files(tokenizer, tmp_path):
    saved, model = (make_model(tokenizer, seed).bfloat16() for seed in (0, 1))
    for each in (saved, model):
        each.lm_head.float()
        each.lm_head.weight.data.mul_(1 / 3)  # not a number of bf16
    saved.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    head = model.lm_head.weight
    load_weights(tmp_path, model)
    assert_equal(saved, model)
    assert model.lm_head.weight is head
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 3}, r"lacks .*layers\.2"),
        ({"num_hidden_layers": 1}, r"the model lacks.*layers\.1"),
        ({"intermediate_size": 32}, r"another shape.*mlp"),
    ],
)
def test_another_models_weights_are_refused(tokenizer, tmp_path, changes, said):
    make_model(tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        load_weights(tmp_path, make_model(tokenizer, **changes))


@pytest.fixture
def make_trainer(training_args, dataset, tokenizer):
    args = {**training_args, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def make():
        model = qwen3_moe(0, len(tokenizer))
        return OPSDTrainer(model, args=OPSDConfig(**args), processing_class=tokenizer, train_dataset=dataset)

    return make


@pytest.mark.usefixtures("deterministic")
def test_a_resumed_mixture_of_experts_equals_the_uninterrupted_one(make_trainer):
    whole, resumed = make_trainer(), make_trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert_equal(whole.model, resumed.model)
    assert not torch.equal(
        whole.model.model.layers[0].mlp.experts.down_proj, qwen3_moe(0).model.layers[0].mlp.experts.down_proj
    )


def test_the_best_checkpoint_brings_its_experts(make_trainer):
    trainer = make_trainer()
    trainer.train()
    best = Path(trainer.args.output_dir) / "checkpoint-2"
    trainer.state.best_model_checkpoint = str(best)
    trainer._load_best_model()
    assert_equal(place(Qwen3MoeForCausalLM.from_pretrained(best)), trainer.model)
