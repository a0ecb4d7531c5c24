"""A way of sampling, as the engines of GRPOTrainer's rollouts are told of it: the attributes to set."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig

from ..changed import changed
from ..sampling import Sampling
from ..sampling.sources import CompletionSource
from .config import SelfDistillationConfig


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


def teacher_settings(
    args: SelfDistillationConfig, source: CompletionSource, tokenizer: Any, end_token_ids: list[int]
) -> dict[str, Any]:
    """Attributes of what samples a teacher, an engine or a trainer, where it does so in another way than rollouts."""
    if not source.samples_teacher or not (args.use_vllm or source.teacher_sampling):
        return {}
    given = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, **source.teacher_sampling}
    sampling = Sampling(**given, max_new_tokens=cast(int, args.max_completion_length))
    if args.use_vllm and args.teacher == "live":
        return vllm_settings(sampling, end_token_ids) if source.teacher_sampling else {}
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos")}
    tokens |= {"eos_token_id": end_token_ids, "cache_implementation": args.cache_implementation}
    return transformers_settings(sampling, tokens, min_p=args.min_p, repetition_penalty=args.repetition_penalty)


@contextmanager
def without_own_settings(models: Sequence[Any]) -> Iterator[None]:
    """
    Inside, the models' own generation configuration says nothing: `generate` fills what another leaves open from it,
    say with a repetition penalty.
    """
    with ExitStack() as stack:
        for model in {id(model): model for model in models}.values():
            stack.enter_context(changed(model, generation_config=GenerationConfig()))
        yield


@contextmanager
def sharded_after(model: torch.nn.Module) -> Iterator[None]:
    """Shards a model's root module again, which FSDP2 leaves to a backward pass that does not come."""
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
