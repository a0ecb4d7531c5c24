"""A copy of an adapter is that adapter, whatever it is made of."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from placement import place
from tiny import make_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl.trainer.utils import use_adapter

from trl_opsd.teacher import EMA, CopiedTeacher, Never, Periodic
from trl_opsd.teacher.copies import AdapterCopy, with_adapter


IDS = torch.arange(6, 26)[None]
ADAPTERS = [
    {"target_modules": ["q_proj", "lm_head"]},
    {"use_dora": True},
    {"trainable_token_indices": [7, 8]},
    {"modules_to_save": ["lm_head", "norm"]},
    {"init_lora_weights": "pissa"},
    {"target_modules": ["embed_tokens"]},
]
TIED = [
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ".*(q_proj|embed_tokens)", "ensure_weight_tying": True},
    {"trainable_token_indices": [7, 8], "ensure_weight_tying": True},
]


def train(policy):
    """As an optimizer step would: every parameter once, a shared one too."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def make_policy(model, settings):
    policy = get_peft_model(model, LoraConfig(r=2, **{"target_modules": ["q_proj"], **settings})).eval()
    train(policy)
    return policy


@pytest.fixture(params=[(False, one) for one in ADAPTERS] + [(True, one) for one in TIED], ids=str)
def make(request, tokenizer):
    is_tied, settings = request.param
    return lambda seed=0: make_policy(make_model(tokenizer, seed, tie_word_embeddings=is_tied), settings)


@torch.no_grad()
def logits(policy, teacher=None):
    if teacher is None:
        return policy(IDS).logits
    with teacher.weights(policy) as module:
        return module(IDS).logits


def test_it_starts_as_the_policy_and_stays(make):
    policy = make()
    before = logits(policy)
    teacher = CopiedTeacher(policy, Never(), lambda model: model)
    copied = logits(policy, teacher)
    torch.testing.assert_close(copied, before)
    train(policy)
    assert not torch.allclose(logits(policy), before)
    assert torch.equal(logits(policy, teacher), copied)


@pytest.mark.parametrize("rule", [Periodic, EMA])
def test_it_becomes_the_policy(make, rule):
    policy = make()
    teacher = CopiedTeacher(policy, rule(1), lambda model: model)
    teacher.on_step_end(1)
    train(policy)
    teacher.on_step_end(2)
    torch.testing.assert_close(logits(policy, teacher), logits(policy))


def test_it_comes_back_from_a_file(make, tmp_path):
    policy, other = make(), make()
    train(other)
    teacher, restored = (CopiedTeacher(its, Never(), lambda model: model) for its in (policy, other))
    assert not torch.allclose(logits(other, restored), logits(policy, teacher))
    teacher.save(tmp_path, True)
    restored.load(tmp_path)
    torch.testing.assert_close(logits(other, restored), logits(policy, teacher))


def test_what_the_policy_ties_is_kept_once(tokenizer):
    settings = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    policy = make_policy(make_model(tokenizer, tie_word_embeddings=True), settings)
    names = [name for name, _, _ in AdapterCopy(policy).pairs() if "lora" not in name]
    assert len(names) == 1
    base = policy.get_base_model()
    assert base.lm_head.modules_to_save["teacher"].weight is base.model.embed_tokens.modules_to_save["teacher"].weight


def test_fused_experts():
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2}
    model = place(Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=96, **sizes, **heads)))
    policy = make_policy(model, {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]})
    before = logits(policy)
    teacher = CopiedTeacher(policy, Never(), lambda model: model)
    train(policy)
    assert not torch.allclose(logits(policy), before)
    assert torch.equal(logits(policy, teacher), before)


@pytest.mark.parametrize("name", [None, "other"])
def test_switching_an_adapter_is_what_peft_does_and_leaves_nothing_behind(make, name):
    policy = make()
    policy.add_adapter("other", policy.peft_config["default"])
    with torch.no_grad():
        for parameter_name, parameter in policy.named_parameters():
            if ".other." in parameter_name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    policy.set_adapter("default")
    before, trained = logits(policy), [parameter.requires_grad for parameter in policy.parameters()]
    with use_adapter(policy, name):
        expected = logits(policy)
    policy.set_adapter("default")

    with with_adapter(policy, name) as module:
        assert torch.equal(logits(module), expected)
        assert [parameter.requires_grad for parameter in policy.parameters()] == trained

    assert not torch.equal(expected, before)
    assert torch.equal(logits(policy), before)
