"""The policy's weights as an inference engine wants them: its adapter merged, under the names of the base model."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

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
    the initial teacher with it. Here a module's weight is put back from a copy and stays bit-identical. No more than
    one module is merged, copied or gathered at a time.

    Args:
        policy ([`~peft.PeftModel`]):
            Policy, not wrapped, with an adapter that can be merged.
        gathered (`Callable`):
            Context manager that makes the given parameters whole, where ZeRO-3 shards them. All processes enter it.

    Yields:
        `tuple[str, torch.Tensor]`: name and whole value of a parameter, valid until the next is asked for.
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
                yield name, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.data

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


@contextmanager
def _merged(module: BaseTunerLayer) -> Iterator[None]:
    base = module.get_base_layer()
    before = {name: parameter.data.clone() for name, parameter in base.named_parameters()}
    module.merge()
    try:
        yield
    finally:
        module.merged_adapters.clear()
        for name, parameter in base.named_parameters():
            parameter.data.copy_(before[name])
