"""Where a model keeps its backbone and its language-model head."""

from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..objective import Head


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def causal_lm(model: nn.Module) -> Any:
    """The causal language model inside a model that may be a `PeftModel`."""
    unwrapped: Any = model
    return unwrapped.get_base_model() if isinstance(model, PeftModel) else model


def backbone_of(model: nn.Module) -> Any:
    """The part of a causal language model that gives the last hidden states."""
    policy = causal_lm(model)
    # Some say another name of it than the one it has
    return getattr(policy, "model", policy) if policy.base_model is policy else policy.base_model


def head_of(model: nn.Module) -> Head:
    """
    The language-model head of a model, with the logit post-processing its configuration declares.

    Read it in the context whose weights are meant: adapters may swap the head module (`modules_to_save`).
    """
    policy = causal_lm(model)
    config = policy.config.get_text_config()
    projection = policy.get_output_embeddings()
    with align_module_device(projection):  # a teacher's may be offloaded
        weight, bias = projection.weight, getattr(projection, "bias", None)
    if getattr(config, "logits_scaling", None) is not None:  # Granite and MiniCPM3 divide, HyperCLOVA X multiplies
        scaling = config.logits_scaling
        scale = scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    elif getattr(config, "logits_mup_width_multiplier", None) is not None:
        scale = 1.0 / config.logits_mup_width_multiplier
    else:
        factors = (getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
        scale = next((factor for factor in factors if factor is not None), 1.0)
    caps = (getattr(config, name, None) for name in _SOFTCAPS)
    softcap = next((cap for cap in caps if cap is not None), None)
    return Head(weight, bias, scale, softcap)


def announce_head(model: nn.Module) -> None:
    """
    Tell ZeRO-3 that the forward of a model reads the head outside of the head's own. It would notice by itself, but
    perhaps after it has learnt in which order parameters are read, and then it fails.
    """
    if is_deepspeed_zero3_enabled():
        import deepspeed

        head = head_of(model)
        for parameter in (head.weight, head.bias):
            if parameter is not None:
                deepspeed.zero.register_external_parameter(model, parameter)


def unsharded(head: Head, num_tokens: int | None = None) -> Head:
    """The head with FSDP2's shards gathered, once, into plain tensors, over the first `num_tokens` tokens."""

    def whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if not isinstance(tensor, DTensor):
            return tensor
        on_device = tensor.to(tensor.device_mesh.device_type)  # it may be offloaded
        return cast(DTensor, on_device).full_tensor()

    weight = whole(head.weight)
    assert weight is not None
    bias = whole(head.bias)
    if num_tokens is not None:  # a slice of all would cost a gradient of its own
        weight, bias = weight[:num_tokens], None if bias is None else bias[:num_tokens]
    return Head(weight, bias, head.scale, head.softcap)
