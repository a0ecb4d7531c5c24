"""Every kind of adapter that PEFT puts into layers: merged for a sampler, copied for a teacher, resumed."""

import dataclasses
import re
from contextlib import nullcontext
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from tiny import make_model

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer
from trl_opsd.serving.merged_weights import check_mergeable, merged_weights
from trl_opsd.teacher.copies import NoSecondAdapterError, copy_of


LAYERS = {"target_modules": ["q_proj", "down_proj"]}
LORA = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "kasa": {"kasa_config": peft.KasaConfig()},
    "qalora": {"use_qalora": True},
    "velora": {"velora_config": peft.VeloraConfig()},
    "bdlora": {"use_bdlora": BdLoraConfig(["q_proj"], ["down_proj"], nblocks=2)},
    "rank_pattern": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    "layers_to_transform": {"layers_to_transform": [1]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}
FROM_DATA = {
    "corda": {"corda_config": CordaConfig(corda_method="kpm")},
    "eva": {"eva_config": EvaConfig()},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
}
LORA |= {kind: {**settings, "init_lora_weights": kind} for kind, settings in FROM_DATA.items()}
OTHERS = {
    "Adamss": {"r": 8, "num_subspaces": 2},
    "BOFT": {},
    "C3A": {"block_size": 8},
    "Deft": {},
    "Delora": {},
    "FourierFT": {"n_frequency": 16},
    "Frod": {},
    "Glora": {},
    "Gralora": {},
    "HRA": {},
    "Hira": {},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LNTuning": {"target_modules": ["input_layernorm"]},
    "LoHa": {},
    "LoKr": {},
    "Miss": {"r": 4},
    "OFT": {},
    "OSF": {},
    "Peanut": {},
    "Psoft": {},
    "Pvera": {},
    "RandLora": {},
    "Road": {"group_size": 8},
    "Shira": {"r": 2},
    "Supertuning": {"r": 4},
    "TinyLora": {},
    "TrainableTokens": {"target_modules": ["embed_tokens"], "token_indices": [8, 9]},
    "UniLora": {},
    "VBLoRA": {"vector_length": 16},
    "Vera": {},
    "WaveFT": {"n_frequency": 16},
}
NOT_MERGED = {"tokens": {"trainable_token_indices": [5, 6]}, "Beft": {}, "Lily": {}}
NOT_COPIED = {"AdaLora": {"total_step": 10}}
KINDS = [*LORA, *OTHERS, *NOT_MERGED, *NOT_COPIED]
REFUSED = {
    "AdaptionPrompt": {"adapter_len": 4, "adapter_layers": 2},
    "CPT": {"cpt_token_ids": [8, 9]},
    "Cartridge": {"num_virtual_tokens": 4},
    "MultitaskPromptTuning": {"num_virtual_tokens": 4},
    "Poly": LAYERS,
    "PrefixTuning": {"num_virtual_tokens": 4},
    "PromptEncoder": {"num_virtual_tokens": 4},
    "PromptTuning": {"num_virtual_tokens": 4},
    "Shadow": {},
    "XLora": {"hidden_size": 32, "adapters": {"first": "outputs/first"}},
}
REFUSED_SETTINGS = {
    "alora_invocation_tokens": [8, 9],
    "arrow_config": ArrowConfig(),
    "layer_replication": [(0, 2), (1, 2)],
    "monteclora_config": peft.MontecloraConfig(),
}


def config_of(kind):
    is_lora = kind in LORA or kind == "tokens"
    settings = (LORA | OTHERS | NOT_MERGED | NOT_COPIED)[kind]
    config_class = "LoraConfig" if is_lora else f"{kind}Config"
    return getattr(peft, config_class)(
        task_type="CAUSAL_LM", **{**LAYERS, **({"r": 4} if is_lora else {}), **settings}
    )


def untrained(tokenizer, kind):
    """A model and its adapter, which is initialised from data where that is asked for."""
    model, config, ids = make_model(tokenizer), config_of(kind), torch.arange(6, 66).view(4, 15)
    ids = ids.to(model.device)
    if kind == "corda":
        preprocess_corda(model, config, lambda: [model(row[None]) for row in ids])
    if kind == "lora_ga":
        preprocess_loraga(model, config, lambda: model(ids, labels=ids).loss.backward())
    policy = get_peft_model(model, config)
    if kind == "eva":
        initialize_lora_eva_weights(policy, [{"input_ids": ids}], show_progress_bar=False)
    return policy


def make_policy(tokenizer, kind):
    """A policy whose adapter has been trained."""
    policy = untrained(tokenizer, kind).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return policy


@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(6, 26)[None]).logits


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_a_sampler_is_sent_is_the_policy_or_is_refused(tokenizer, kind):
    policy = make_policy(tokenizer, kind)
    before = logits(policy)
    if kind in NOT_MERGED:
        with pytest.raises(ValueError, match=r"cannot be merged .*`use_vllm=False`"):
            check_mergeable(policy)
    else:
        check_mergeable(policy)
        fresh = make_model(tokenizer)
        assert not torch.allclose(logits(fresh), before, atol=1e-3)
        fresh.load_state_dict(dict(merged_weights(policy, lambda parameters: nullcontext())), strict=False)
        torch.testing.assert_close(logits(fresh), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(policy), before)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_copy_is_the_policy_as_it_was_or_is_refused(tokenizer, kind):
    policy = make_policy(tokenizer, kind)
    before = logits(policy)
    if kind in NOT_COPIED:
        with pytest.raises(NoSecondAdapterError, match=rf"second adapter of the policy's kind \({kind}Config\)"):
            copy_of(policy, lambda model: model)
        return
    copy = copy_of(policy, lambda model: model)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1)
    assert not torch.allclose(logits(policy), before, atol=1e-3)
    with copy.weights(policy) as teacher:
        torch.testing.assert_close(logits(teacher), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(tokenizer, dataset, training_args, tmp_path, kind):
    def train(checkpoint):
        torch.manual_seed(0)
        trainer = SelfDistillationTrainer(
            untrained(tokenizer, kind) if kind in FROM_DATA else make_model(tokenizer),
            args=SelfDistillationConfig(
                **{**training_args, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.01},
                teacher="initial" if kind in NOT_COPIED else "ema",
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=None if kind in FROM_DATA else config_of(kind),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        values = {**trainer.model.state_dict(), "policy": logits(trainer.model)}
        with trainer.teacher.weights(trainer.model) as teacher:
            return {**values, "teacher": logits(teacher)}

    whole = train(None)
    resumed = train(str(tmp_path / "run" / "checkpoint-1"))
    assert whole.keys() == resumed.keys()
    assert not torch.equal(whole["teacher"], whole["policy"])
    if kind in NOT_COPIED:
        assert torch.equal(whole["teacher"], logits(make_model(tokenizer)))
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.fixture
def refused(tokenizer, dataset, training_args):
    """Both the adapter that a model is to get and the one that it has are refused with one error."""

    def check(config, message, model=None):
        with pytest.raises(ValueError, match=message):
            SelfDistillationTrainer(
                model or make_model(tokenizer),
                args=SelfDistillationConfig(**training_args),
                train_dataset=dataset,
                processing_class=tokenizer,
                peft_config=config,
            )

    return check


@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_that_cannot_be_trained(refused, kind):
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **REFUSED[kind])
    message = rf"The adapter of `{kind}Config` cannot be trained: .*\. Use `LoraConfig`, or train all weights"
    refused(config, message)
    refused(None, message, SimpleNamespace(active_peft_config=config))


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_settings_that_cannot_be_trained(refused, name):
    config = peft.LoraConfig(**LAYERS, **{name: REFUSED_SETTINGS[name]})
    refused(config, rf"`LoraConfig` with `{name}` cannot be trained: .*\. Leave `{name}` unset")


@pytest.mark.parametrize("kind", FROM_DATA)
def test_an_initialisation_from_data_has_to_be_made_before(refused, kind):
    how = {"corda": "preprocess_corda", "eva": "initialize_lora_eva_weights", "lora_ga": "preprocess_loraga"}[kind]
    refused(config_of(kind), rf"`init_lora_weights='{kind}'` .* from data.*`{how}\(.* give `policy` as `model`")


def test_every_kind_of_adapter_that_peft_has_is_tried_or_refused():
    tried = {"Lora", *OTHERS, *NOT_MERGED, *NOT_COPIED} - {"tokens"}
    known = {f"{kind}Config" for kind in tried | REFUSED.keys()}
    assert known == {config.__name__ for config in PEFT_TYPE_TO_CONFIG_MAPPING.values()}


def test_every_variant_of_lora_that_peft_has_is_tried_or_refused():
    given = {name for settings in LORA.values() for name in settings} | REFUSED_SETTINGS.keys()
    fields = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    variants = {name for name, field in fields.items() if field.metadata.get("is_lora_variant")}
    assert variants - given == set()
    kinds = set(re.findall(r'"(\w+)"', fields["init_lora_weights"].type))
    kinds -= {"gaussian", "loftq"}  # the second takes bitsandbytes and a GPU
    assert kinds - {settings.get("init_lora_weights") for settings in LORA.values()} == set()
