"""A way of sampling, as the engines of GRPOTrainer's rollouts are told of it: the attributes to set."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from ..sampling import Sampling


def vllm_settings(sampling: Sampling, end_token_ids: list[int]) -> dict[str, Any]:
    """Attributes of `vllm_generation`."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": None,
        "repetition_penalty": 1.0,
        "max_completion_length": sampling.max_new_tokens,
        "structured_outputs_regex": None,
        "generation_kwargs": {"stop_token_ids": end_token_ids},
    }


def transformers_settings(sampling: Sampling, generation_kwargs: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """Attributes of the trainer: special tokens and cache of `generation_kwargs`, and `others` when drawing."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "cache_implementation")
    kwargs = {name: generation_kwargs.get(name) for name in names}
    kwargs |= {"max_new_tokens": sampling.max_new_tokens, "do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        kwargs |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        kwargs |= others
    return {"generation_config": GenerationConfig(**kwargs, disable_compile=True), "generation_kwargs": kwargs}


@contextmanager
def changed_settings(target: Any, settings: Mapping[str, Any], models: Sequence[Any]) -> Iterator[None]:
    """
    Inside, sampling is done by other settings.

    Args:
        target (`Any`):
            Object whose attributes they are.
        settings (`Mapping[str, Any]`):
            The attributes.
        models (`Sequence[Any]`):
            Models whose own generation configuration says nothing meanwhile: `generate` fills what another leaves open
            from it, say with a repetition penalty.
    """
    originals = {name: getattr(target, name) for name in settings}
    vars(target).update(settings)
    unique = {id(model): model for model in models}.values()
    own_configs = [model.generation_config for model in unique]
    for model in unique:
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for model, config in zip(unique, own_configs, strict=True):
            model.generation_config = config
        vars(target).update(originals)
