"""The policy's weights as an inference engine wants them: its adapter merged, under the names of the base model."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor


def merged_weights(
    policy: PeftModel,
    gathered: Callable[[list[nn.Parameter]], AbstractContextManager[None]],
    merges: bool = True,
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Every parameter of the base model, with the active adapter merged into it.

    Merging in place and unmerging again does not give the base back: in bf16 it drifts with every synchronisation, and
    the initial teacher with it. Here a module's own weight is set aside meanwhile, bit-identical. No more than one
    module is merged, copied or gathered at a time.

    What is yielded stays as it is while more is asked for, since senders pack several values before they send them.

    Args:
        policy ([`~peft.PeftModel`]):
            Policy, not wrapped, with an adapter that can be merged.
        gathered (`Callable`):
            Context manager that makes the given parameters whole, where ZeRO-3 shards them. All processes enter it.
        merges (`bool`, *optional*, defaults to `True`):
            Whether the adapter is merged. Without it, the base may be one of 4 bits: what is yielded are the values
            that its layers compute with.

    Yields:
        `tuple[str, torch.Tensor]`: name and whole value of a parameter.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(module, BaseTunerLayer):
            with gathered(list(module.parameters())), _merged(module) if merges else nullcontext():
                yield from values(module.get_base_layer().named_parameters(), prefix)
            return
        if isinstance(module, ModulesToSaveWrapper):
            adapter = module.active_adapters[0]
            yield from walk(module.modules_to_save[adapter], prefix)
            return
        for name, parameter in module.named_parameters(recurse=False):
            with gathered([parameter]):
                yield from values([(name, parameter)], prefix)
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}{name}.")

    def values(parameters: Iterable[tuple[str, nn.Parameter]], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in parameters:
            if id(parameter) not in seen:  # tied weights have one name
                seen.add(id(parameter))
                name = f"{prefix}{name}".replace("_checkpoint_wrapped_module.", "")
                yield name, whole(parameter)

    yield from walk(policy.get_base_model(), "")


def whole(parameter: nn.Parameter) -> torch.Tensor:
    """The value of a parameter that FSDP2 may have sharded, and bitsandbytes have brought to 4 bits."""
    if isinstance(parameter, DTensor):
        on_device = parameter.to(parameter.device_mesh.device_type)  # it may be offloaded
        return cast(DTensor, on_device).full_tensor()
    return dequantize_bnb_weight(parameter) if hasattr(parameter, "quant_state") else parameter.data


def quantized_parameter(policy: nn.Module) -> str | None:
    """The name of a parameter that is quantised, if there is one."""
    for name, parameter in policy.named_parameters():
        if hasattr(parameter, "quant_state") or not parameter.is_floating_point():
            return name
    return None


def check_mergeable(policy: PeftModel) -> None:
    """
    Refuse adapters that [`merged_weights`] cannot merge.

    Raises:
        ValueError: If the policy has such an adapter.
    """
    for name, module in policy.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            raise ValueError(
                f"The adapter on {name} ({type(module).__name__}) cannot be merged into the weights that vLLM samples "
                "with. Leave `trainable_token_indices` unset, or set `use_vllm=False`."
            )
    if (quantized := quantized_parameter(policy)) is not None:
        raise ValueError(
            f"{quantized} is quantised: merging an adapter into it for vLLM would quantise it anew at every "
            "synchronisation. Set `vllm_lora_sync='adapter'` (a server needs `--enable-lora`), train on an "
            "unquantised base, or set `use_vllm=False`."
        )
    layers = {name: module for name, module in policy.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, layer in layers.items():
        has_bias = getattr(layer.get_base_layer(), "bias", None) is not None
        if not has_bias and any(getattr(layer, "lora_bias", {}).get(adapter) for adapter in policy.active_adapters):
            raise ValueError(
                f"{name} has no bias that the adapter's could be merged into for vLLM. Set `lora_bias=False` in the "
                "adapter's configuration, or set `use_vllm=False`."
            )
    _check_tied(policy.get_base_model())
    _try_to_merge(layers)


def _check_tied(model: Any) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or _original(embedding).weight is not _original(head).weight:
        return
    if _added(embedding) != _added(head):
        raise ValueError(
            "The policy's embedding and head are tied, and its adapter does not change both alike: vLLM keeps one "
            "matrix for both and would sample with another policy. Name `modules_to_save: [embed_tokens]` with "
            "`ensure_weight_tying: true` in the adapter's configuration, leave the embedding and the head out of "
            "`modules_to_save` and `target_modules`, or set `use_vllm=False`."
        )


def _original(module: Any) -> Any:
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def _added(module: nn.Module) -> set[int]:
    """What tells the parameters that adapters add to a module: their place in memory, or themselves if sharded."""
    original = set(_original(module).parameters())
    return {added.data_ptr() or id(added) for added in module.parameters() if added not in original}


def _try_to_merge(layers: dict[str, BaseTunerLayer]) -> None:
    """Find out at once what peft would refuse at the first synchronisation, with one layer of each kind."""
    tried = set()
    for name, layer in layers.items():
        kind = (type(layer), *map(type, getattr(layer, "lora_variant", {}).values()))
        is_sharded = any(hasattr(parameter, "ds_id") for parameter in layer.parameters())
        if kind in tried or is_sharded:
            continue
        tried.add(kind)
        try:
            with _merged(layer):
                pass
        except Exception as error:
            raise ValueError(
                f"The adapter on {name} ({type(layer).__name__}) cannot be merged into the weights that vLLM samples "
                f"with: {error} Choose other settings of the adapter, or set `use_vllm=False`."
            ) from error


@contextmanager
def _merged(module: BaseTunerLayer) -> Iterator[None]:
    layers = [module]
    while isinstance(layers[-1].base_layer, BaseTunerLayer):  # one for each parameter of a mixture's experts
        layers.append(layers[-1].base_layer)
    original_layers = [layer.base_layer for layer in layers]
    base = module.get_base_layer()
    originals = []
    for parameter in base.parameters():
        if isinstance(parameter, DTensor):  # its shard cannot be exchanged; what is yielded of it is a copy anyway
            originals.append(parameter.to_local().detach().clone())
        else:
            originals.append(parameter.data)
            parameter.data = parameter.data.clone()
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer, original_layer in zip(layers, original_layers, strict=True):
            if layer.base_layer is original_layer:
                layer.merged_adapters.clear()
            else:  # LN tuning merges by exchanging the layers
                layer.unmerge()
        for parameter, original in zip(base.parameters(), originals, strict=True):
            if isinstance(parameter, DTensor):
                parameter.to_local().detach().copy_(original)
            else:
                parameter.data = original
