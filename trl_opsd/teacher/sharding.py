"""
Reading and writing parameters that DeepSpeed ZeRO-3 or FSDP2 may have sharded.

Every process holds a part of each parameter: the partition of ZeRO-3, the local shard of FSDP2, or all of it.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def part_of(parameter: nn.Parameter) -> torch.Tensor:
    """This process's part of a parameter: its memory, not a copy."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach()
    return cast(torch.Tensor, getattr(parameter, "ds_tensor", parameter)).detach()


@torch.no_grad()
def write_part(parameter: nn.Parameter, part: torch.Tensor) -> None:
    """Overwrite this process's part of a parameter, in its dtype. Every process has to do so."""
    part_of(parameter).copy_(part)
    zero: Any = parameter
    if hasattr(parameter, "ds_tensor"):
        zero.partition(has_been_updated=False)  # drops a whole value that ZeRO-3 may be holding on to


def whole_value(parameter: nn.Parameter, part: torch.Tensor) -> torch.Tensor:
    """The whole of a value sharded like `parameter`, on the CPU. Every process has to call it with its part."""
    zero: Any = parameter
    if isinstance(parameter, DTensor):
        sharded = DTensor.from_local(
            part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
        return sharded.full_tensor().cpu()
    if hasattr(parameter, "ds_tensor"):
        group = zero.ds_process_group
        part = part.to(zero.ds_tensor.device if dist.get_backend(group) == "gloo" else parameter.device)
        parts = part.new_empty(dist.get_world_size(group) * part.numel())
        dist.all_gather_into_tensor(parts, part.contiguous(), group=group)
        return parts[: zero.ds_numel].view(zero.ds_shape).cpu()
    return part.detach().cpu().clone()


def shard_like(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole value, if it is sharded like `parameter`. Every process has to call it."""
    zero: Any = parameter
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements).to_local()
    if hasattr(parameter, "ds_tensor"):
        size, rank = zero.ds_tensor.numel(), dist.get_rank(zero.ds_process_group)
        part = torch.zeros(size, dtype=value.dtype)  # the last partition may reach past the end
        mine = value.flatten()[rank * size : (rank + 1) * size]
        part[: mine.numel()] = mine
        return part
    return value


def copy_parameter(source: nn.Parameter, target: nn.Parameter) -> None:
    """Copy one parameter into another of the same shape. Every process has to do so."""
    part = part_of(source)
    if hasattr(source, "ds_tensor") != hasattr(target, "ds_tensor"):  # before DeepSpeed has seen both
        part = shard_like(target, whole_value(source, part))
    write_part(target, part)
