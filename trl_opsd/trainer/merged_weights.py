"""The policy's weights as an inference engine wants them: its adapter merged, under the names of the base model."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor


def merged_weights(
    policy: PeftModel, gathered: Callable[[list[nn.Parameter]], AbstractContextManager[None]]
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

    Yields:
        `tuple[str, torch.Tensor]`: name and whole value of a parameter.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(module, BaseTunerLayer):
            with gathered(list(module.parameters())), _merged(module):
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

    def values(parameters, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in parameters:
            if id(parameter) not in seen:  # tied weights have one name
                seen.add(id(parameter))
                name = f"{prefix}{name}".replace("_checkpoint_wrapped_module.", "")
                if isinstance(parameter, DTensor):
                    on_device = parameter.to(parameter.device_mesh.device_type)  # it may be offloaded
                    yield name, cast(DTensor, on_device).full_tensor()
                else:
                    yield name, parameter.data

    yield from walk(policy.get_base_model(), "")


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
        if isinstance(module, BaseTunerLayer) and hasattr(module.get_base_layer().weight, "quant_state"):
            raise ValueError(
                f"{name} is quantised: merging its adapter for vLLM would quantise it anew at every synchronisation. "
                "Train on an unquantised base, or set `use_vllm=False`."
            )


@contextmanager
def _merged(module: BaseTunerLayer) -> Iterator[None]:
    layers = [module]
    while isinstance(layers[-1].base_layer, BaseTunerLayer):  # one for each parameter of a mixture's experts
        layers.append(layers[-1].base_layer)
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
        for layer in layers:
            layer.merged_adapters.clear()
        for parameter, original in zip(base.parameters(), originals, strict=True):
            if isinstance(parameter, DTensor):
                parameter.to_local().detach().copy_(original)
            else:
                parameter.data = original
