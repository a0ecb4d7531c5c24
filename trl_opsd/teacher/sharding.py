"""Reading and writing parameters that DeepSpeed ZeRO-3 or FSDP2 may have sharded."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


@contextmanager
def gathered(*parameters: nn.Parameter) -> Iterator[None]:
    """Makes ZeRO-3 parameters whole inside the context. What rank 0 writes to them reaches the other ranks on exit."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0):
        yield


def full_value(parameter: nn.Parameter) -> torch.Tensor:
    """The whole value of a parameter, on the CPU. Every process has to call it."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach().cpu()
    with gathered(parameter):
        return parameter.detach().cpu().clone()


@torch.no_grad()
def set_value(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Write a whole value into a parameter. Every process has to call it, with the same value."""
    if isinstance(parameter, DTensor):
        parameter.copy_(distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements))
        return
    with gathered(parameter):
        parameter.copy_(value)


@torch.no_grad()
def copy_parameter(source: nn.Parameter, target: nn.Parameter) -> None:
    """Copy one parameter into another that is sharded the same way."""
    with gathered(source, target):
        target.copy_(source)
