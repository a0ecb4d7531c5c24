"""An adapter that vLLM loads by itself makes the policy of the base that was sent, or is refused with its reason."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import make_model
from tiny_vlm import make_vlm
from trl.trainer import grpo_trainer

from trl_opsd.serving import connect, prepare_sampler, report_failures
from trl_opsd.serving.adapter import adapter_weights, engine_for_adapters, needs_adapter, obstacle, write_adapter
from trl_opsd.serving.client import ServerError
from trl_opsd.serving.merged_weights import merged_weights


def make_policy(model, **settings):
    """A policy whose adapter has been trained."""
    policy = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}))
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return policy.eval()


@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(6, 26)[None]).logits


def everything(parameters):
    return nullcontext()


@torch.no_grad()
def loaded(model, policy, folder):
    """A model with what is sent of a policy, as vLLM reads it: W + alpha / r · B A with one alpha and r for all."""
    model.load_state_dict(dict(merged_weights(policy, everything, merges=False)), strict=False)
    write_adapter(folder, adapter_weights(policy, everything))
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    for name in [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]:
        module = model.get_submodule(name.removeprefix("base_model.model."))
        assert name.split(".")[-1] in config["target_modules"]
        first, second = weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]
        assert len(first) <= config["r"]
        module.weight += (config["lora_alpha"] / config["r"] * second @ first).to(module.weight.device)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 3},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"down_proj": 5}},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_base_and_adapter_make_the_policy(settings, tokenizer, tmp_path):
    policy = make_policy(make_model(tokenizer), **settings)
    before = logits(policy)

    assert obstacle(policy) is None
    fresh = loaded(make_model(tokenizer), policy, tmp_path)
    torch.testing.assert_close(logits(fresh), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(policy), before)


def test_the_adapter_that_is_active_is_sent(tokenizer, tmp_path):
    policy = make_policy(make_model(tokenizer))
    policy.add_adapter("teacher", LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    before = logits(policy)

    assert obstacle(policy) is None
    torch.testing.assert_close(logits(loaded(make_model(tokenizer), policy, tmp_path)), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"use_dora": True}, r"q_proj it is a variant \(DoraLinearVariant\)"),
        ({"modules_to_save": ["lm_head"]}, r"lm_head\.modules_to_save\.default\.weight is trained too"),
        ({"bias": "all"}, r"q_proj\.base_layer\.bias is trained too"),
        ({"lora_bias": True}, r"q_proj\.lora_B\.default\.bias is trained too"),
        ({"trainable_token_indices": [5, 6]}, r"embed_tokens\.token_adapter is no linear layer"),
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens is no linear layer"),
        ({"target_parameters": ["mlp.down_proj.weight"], "target_modules": []}, r"down_proj is no linear layer"),
        ({"r": 600}, r"rank of 600 is above vLLM's 512"),
    ],
    ids=str,
)
def test_what_vllm_would_not_load_has_its_reason(settings, problem, tokenizer):
    policy = make_policy(make_model(tokenizer, attention_bias=True), **settings)
    with pytest.raises(AssertionError, match=problem):
        assert not obstacle(policy), obstacle(policy)


def test_what_is_no_single_adapter_of_lora_has_its_reason(tokenizer):
    assert obstacle(make_model(tokenizer)) == "the policy has none"
    policy = get_peft_model(make_model(tokenizer), LoHaConfig(target_modules=["q_proj"]))
    assert "made of `LoHaConfig`" in obstacle(policy)
    policy = make_policy(make_model(tokenizer))
    policy.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    policy.base_model.set_adapter(["default", "second"])
    assert obstacle(policy) == "2 are active, and vLLM applies one"
    policy = make_policy(make_model(tokenizer))
    policy.get_base_model().model.norm.weight.requires_grad_(True)
    assert "model.norm.weight is trained too" in obstacle(policy)
    policy = make_policy(make_model(tokenizer))
    norm = policy.get_base_model().model.norm.weight
    norm.requires_grad_(False).data = norm.data.to(torch.int8)
    assert "model.norm.weight is quantised, and in another way" in obstacle(policy)


@pytest.mark.parametrize(
    ("family", "targets", "beside"),
    [
        ("qwen2_5_vl", ["gate_proj"], "visual.blocks.0.mlp.gate_proj"),
        ("qwen3_vl", "all-linear", "visual.blocks.0.attn.qkv"),
        ("gemma3", ["v_proj"], "vision_tower.encoder.layers.0.self_attn.v_proj"),
        ("idefics3", ["proj"], "connector.modality_projection.proj"),
    ],
)
def test_an_adapter_beside_the_language_model_is_merged_or_refused_before_an_engine_is_made(family, targets, beside):
    model, _ = make_vlm(family)
    policy = get_peft_model(model, LoraConfig(target_modules=targets))
    message = rf"`vllm_lora_sync='adapter'`: .*{beside} is not of the language model.*vllm_lora_sync='merged'"
    with engine_for_adapters("adapter"), pytest.raises(ValueError, match=message) as refused:
        grpo_trainer.VLLMGeneration(model=policy, mode="colocate", enable_sleep_mode=False)
    assert not needs_adapter("auto", policy)

    assert "`exclude_modules`" in str(refused.value)
    kept_off = LoraConfig(target_modules="all-linear", exclude_modules=".*(visual|vision|connector).*")
    assert obstacle(get_peft_model(policy.unload(), kept_off)) is None


class Sender(SimpleNamespace):
    """Sends weights as TRL's does, in server mode."""

    def sync_weights(self):
        self.sent.append(dict(self._iter_named_params()))


@pytest.fixture
def server(serve, tokenizer):
    server = serve(make_model(tokenizer), tokenizer)
    server.lora_config = {"max_lora_rank": 8}
    return server


@pytest.fixture
def sender(server):
    return Sender(
        mode="server",
        accelerator=SimpleNamespace(is_main_process=True),
        vllm_client=connect(server.url, 60.0, 60.0),
        generate=lambda *args: args,
        _dist=SimpleNamespace(gather_params=everything),
        sent=[],
    )


def test_server_for_adapters_gets_the_base_once_and_the_adapter_after_each_step(sender, server, tokenizer, tmp_path):
    policy = make_policy(make_model(tokenizer), init_lora_weights="pissa")
    _, sent = prepare_sampler(sender, policy, tokenizer, 60.0, lora_sync="adapter", shared=tmp_path / "run")
    report_failures(sender)
    for parameter in policy.parameters():
        parameter.data += 0.5 * parameter.requires_grad
    sender.sync_weights()

    assert sent == "its adapter alone"
    assert [len(base) for base in sender.sent] == [len(dict(make_model(tokenizer).named_parameters()))]
    first, *_, second, last = server.adapters
    assert last == "forgotten"
    expected = adapter_weights(policy, everything)
    assert expected.keys() == second.keys()
    assert all(torch.equal(second[name], value) for name, value in expected.items())
    assert not any(torch.equal(first[name], value) for name, value in expected.items())
    assert sender.vllm_client._client.model == "policy"  # is asked for it from now on


def test_server_that_fails_to_load_an_adapter_ends_the_run(sender, server, tokenizer, tmp_path):
    prepare_sampler(sender, make_policy(make_model(tokenizer)), tokenizer, 60.0, lora_sync="adapter", shared=tmp_path)
    report_failures(sender)
    server.faults = [400]
    sender.sync_weights()
    with pytest.raises(ServerError, match=r"answers with status 400.*told to fail"):
        sender.generate()


@pytest.mark.parametrize(
    ("config", "settings", "told_otherwise", "faults", "problem"),
    [
        (None, {}, None, [], "was started without `--enable-lora`"),
        ({"max_lora_rank": 8}, {"r": 16}, None, [], "has `--max-lora-rank 8`, and the adapter a rank of 16"),
        ({"max_lora_rank": 8}, {"use_dora": True}, None, [], "is a variant"),
        ({"max_lora_rank": 8}, {}, "it is asked for the base", [], "it is asked for the base"),
        ({"max_lora_rank": 8}, {}, None, [404], "was started without `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`"),
        ({"max_lora_rank": 8}, {}, None, [400], "answers with status 400: .*told to fail"),
    ],
    ids=["no-lora", "rank", "dora", "told", "runtime", "not-loaded"],
)
def test_server_that_cannot_load_the_adapter(
    config, settings, told_otherwise, faults, problem, sender, server, tokenizer, tmp_path
):
    policy = make_policy(make_model(tokenizer), **settings)
    server.lora_config, server.faults = config, list(faults)
    given = {"lora_sync": "adapter", "shared": tmp_path, "told_otherwise": told_otherwise}
    with pytest.raises(ValueError, match=rf"`vllm_lora_sync='adapter'`: .*{problem}.*vllm_lora_sync='merged'"):
        prepare_sampler(sender, policy, tokenizer, 60.0, **given)


def test_merged_is_merged_wherever_an_adapter_could_be_loaded(sender, server, tokenizer):
    _, sent = prepare_sampler(sender, make_policy(make_model(tokenizer)), tokenizer, 60.0)
    assert sent == "all weights, its adapter merged"
    assert server.adapters == []
