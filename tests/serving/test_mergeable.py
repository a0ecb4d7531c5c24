"""An adapter that vLLM is sent merged is the policy's to the last layer, or is refused before anything starts."""

from contextlib import nullcontext

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from placement import place
from tiny import make_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_opsd.serving.merged_weights import check_mergeable, merged_weights


EMBEDDINGS = ["embed_tokens", "lm_head"]


def make_policy(model, config):
    policy = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


@torch.no_grad()
def assert_sent(policy, fresh):
    """What is sent makes of an untrained model the policy."""
    ids = torch.arange(6, 26)[None]
    before = policy(ids).logits
    check_mergeable(policy)
    assert torch.equal(policy(ids).logits, before)  # trying has changed nothing
    sent = dict(merged_weights(policy, lambda parameters: nullcontext()))
    assert sent.keys() == dict(fresh.named_parameters()).keys()
    fresh.load_state_dict(sent, strict=False)
    torch.testing.assert_close(fresh.eval()(ids).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": EMBEDDINGS},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": EMBEDDINGS},
        {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_what_an_adapter_unties(tokenizer, settings):
    config = LoraConfig(r=2, **{"target_modules": ["q_proj"], **settings})
    with pytest.raises(ValueError, match=r"embedding and head .* tied.*ensure_weight_tying"):
        check_mergeable(make_policy(make_model(tokenizer, tie_word_embeddings=True), config))
    apart = make_policy(make_model(tokenizer), LoraConfig(r=2, **{"target_modules": ["q_proj"], **settings}))
    assert_sent(apart, make_model(tokenizer))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_what_stays_tied(tokenizer, settings):
    config = LoraConfig(r=2, **{"target_modules": ["q_proj"], **settings})
    policy = make_policy(make_model(tokenizer, tie_word_embeddings=True), config)
    assert_sent(policy, make_model(tokenizer, tie_word_embeddings=True))


def test_tied_adapters_that_a_move_has_parted(tokenizer):
    """peft ties the two by memory, which moving the model to another device gives up."""
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    policy = make_policy(make_model(tokenizer, tie_word_embeddings=True), config)
    head = policy.get_base_model().lm_head
    head.lora_A["default"].weight.data = head.lora_A["default"].weight.data.clone()
    with pytest.raises(ValueError, match="tied"):
        check_mergeable(policy)


@pytest.mark.parametrize("parameters", [["experts.gate_up_proj"], ["experts.gate_up_proj", "experts.down_proj"]])
def test_fused_experts(parameters):
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(vocab_size=96, **sizes, **heads)
    fresh, model = (place(Qwen3MoeForCausalLM(config)) for _ in range(2))
    model.load_state_dict(fresh.state_dict())
    assert_sent(make_policy(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)), fresh)


def test_layers_that_are_exchanged_to_be_merged(tokenizer):
    policy = make_policy(make_model(tokenizer), LNTuningConfig(target_modules=["input_layernorm"]))
    assert_sent(policy, make_model(tokenizer))


def test_a_bias_that_has_no_place(tokenizer):
    config = LoraConfig(target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(ValueError, match=r"q_proj has no bias .*lora_bias=False"):
        check_mergeable(get_peft_model(make_model(tokenizer), config))
    with_bias = make_policy(make_model(tokenizer, attention_bias=True), config)
    assert_sent(with_bias, make_model(tokenizer, attention_bias=True))


def test_what_peft_cannot_merge(tokenizer):
    config = LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    with pytest.raises(ValueError, match=r"q_proj.*cannot be merged.*use_vllm=False"):
        check_mergeable(get_peft_model(make_model(tokenizer), config))
