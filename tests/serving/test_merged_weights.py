"""The adapter reaches the sampler merged, and the base stays as it is, to the last bit."""

import copy
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model

from trl_opsd.serving.merged_weights import check_mergeable, merged_weights


@contextmanager
def whole(parameters):
    yield


@pytest.fixture(params=["lora", "dora", "modules_to_save", "bias", "embedding"])
def make_policy(request, tokenizer):
    def make(dtype=torch.float32, **overrides):
        torch.manual_seed(1)
        config = LoraConfig(
            r=4,
            init_lora_weights=request.param == "modules_to_save",
            target_modules={"bias": ["q_proj"], "embedding": ["q_proj", "embed_tokens"]}.get(
                request.param, ["q_proj", "down_proj"]
            ),
            use_dora=request.param == "dora",
            modules_to_save=["lm_head"] if request.param == "modules_to_save" else None,
            lora_bias=request.param == "bias",
        )
        model = make_model(tokenizer, attention_bias=True, **overrides).to(dtype)
        policy = get_peft_model(model, config, autocast_adapter_dtype=False)
        policy.add_adapter("teacher", config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn_like(parameter) * 0.1
        return policy

    return make


def test_weights_are_those_of_the_merged_model(make_policy, tokenizer):
    policy = make_policy()
    expected = copy.deepcopy(policy).merge_and_unload()

    found = dict(merged_weights(policy, whole))  # all at once, as a sender that packs them would

    assert found.keys() == dict(expected.named_parameters()).keys()
    for name, value in expected.named_parameters():
        torch.testing.assert_close(found[name], value.data, rtol=1e-5, atol=1e-6)
    fresh = make_model(tokenizer, attention_bias=True)
    fresh.load_state_dict(found)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(ids).logits, policy.eval()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make_policy", ["lora", "dora", "bias", "embedding"], indirect=True
)  # all that leave the head
def test_tied_weights_have_one_name(make_policy, tokenizer):
    policy = make_policy(tie_word_embeddings=True)

    names = [name for name, _ in merged_weights(policy, whole)]

    untuned = make_model(tokenizer, attention_bias=True, tie_word_embeddings=True)
    assert names == [name for name, _ in untuned.named_parameters()]


def test_base_stays_bit_identical_in_bf16(make_policy):
    policy = make_policy(torch.bfloat16)
    before = {name: value.clone() for name, value in policy.state_dict().items()}

    for _ in range(300):
        sent = sum(1 for _ in merged_weights(policy, whole))

    assert sent > 10
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(getattr(module, "merged_adapters", None) for module in policy.modules())


def test_base_is_put_back_when_sending_fails(make_policy):
    policy = make_policy()
    before = {name: value.clone() for name, value in policy.state_dict().items()}

    for name, _ in (weights := merged_weights(policy, whole)):
        if name.endswith("q_proj.weight"):
            weights.close()

    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_one_module_is_gathered_at_a_time(make_policy):
    held, most = [], []

    @contextmanager
    def watching(parameters):
        assert not held
        held.extend(parameters)
        most.append(sum(parameter.numel() for parameter in parameters))
        yield
        held.clear()

    policy = make_policy()
    for _ in merged_weights(policy, watching):
        assert held
    assert max(most) < sum(parameter.numel() for parameter in policy.parameters()) / 4


def test_what_cannot_be_merged_is_refused(tokenizer):
    policy = get_peft_model(
        make_model(tokenizer), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    )
    with pytest.raises(ValueError, match="trainable_token_indices"):
        check_mergeable(policy)


def test_quantised_base_is_refused(tokenizer):
    policy = get_peft_model(make_model(tokenizer), LoraConfig(target_modules=["q_proj"]))
    check_mergeable(policy)
    policy.get_base_model().model.layers[1].self_attn.q_proj.base_layer.weight.quant_state = object()
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.q_proj\.base_layer\.weight is quantised.*vllm_lora_sync='adapter'"
    ):
        check_mergeable(policy)
