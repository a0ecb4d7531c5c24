"""Every kind of adapter that PEFT puts into layers: merged for a sampler, copied for a teacher, resumed."""

from contextlib import nullcontext

import peft
import pytest
import torch
from peft import get_peft_model
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
    "eva": {"init_lora_weights": "eva"},
    "rank_pattern": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    "layers_to_transform": {"layers_to_transform": [1]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}
OTHERS = {
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
    "TinyLora": {},
    "UniLora": {},
    "VBLoRA": {"vector_length": 16},
    "Vera": {},
    "WaveFT": {"n_frequency": 16},
}
NOT_MERGED = {"tokens": {"trainable_token_indices": [5, 6]}, "Beft": {}, "Lily": {}}
NOT_COPIED = {"AdaLora": {"total_step": 10}}
KINDS = LORA | OTHERS | NOT_MERGED | NOT_COPIED


def config_of(kind):
    kind_of_lora = kind in LORA or kind == "tokens"
    settings = {**LAYERS, **({"r": 4} if kind_of_lora else {}), **KINDS[kind]}
    return getattr(peft, "LoraConfig" if kind_of_lora else f"{kind}Config")(task_type="CAUSAL_LM", **settings)


def make_policy(tokenizer, kind):
    """A policy whose adapter has been trained."""
    policy = get_peft_model(make_model(tokenizer), config_of(kind)).eval()
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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NOT_COPIED])
def test_a_resumed_run_is_the_uninterrupted_one(tokenizer, dataset, training_args, tmp_path, kind):
    def train(checkpoint):
        torch.manual_seed(0)
        trainer = SelfDistillationTrainer(
            make_model(tokenizer),
            args=SelfDistillationConfig(
                **{**training_args, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.01}, teacher="ema"
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=config_of(kind),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        values = {**trainer.model.state_dict(), "policy": logits(trainer.model)}
        with trainer.teacher.weights(trainer.model) as teacher:
            return {**values, "teacher": logits(teacher)}

    whole = train(None)
    resumed = train(str(tmp_path / "run" / "checkpoint-1"))
    assert whole.keys() == resumed.keys()
    assert not torch.equal(whole["teacher"], whole["policy"])
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
