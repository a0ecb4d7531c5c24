"""How a computation over logits is carried out: in which dtype, by which kernel, how many rows at once."""

import logging
from functools import cache
from typing import NamedTuple

import torch

from .blocks import Blocks, default_memory
from .kernels import default_kernel


_logger = logging.getLogger(__name__)


class Execution(NamedTuple):
    """
    How a call is carried out.

    Args:
        dtype (`torch.dtype`):
            Of the operands of the products.
        wide (`torch.dtype`):
            Of all else: fp32, or fp64 for fp64 inputs.
        kernel (`str`):
            What does the elementwise work.
        blocks ([`Blocks`]):
            Rows at once.
    """

    dtype: torch.dtype
    wide: torch.dtype
    kernel: str
    blocks: Blocks

    @classmethod
    def plan(
        cls,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        num_sides: int,
        memory_budget: float | None,
        kernel: str | None,
        head_gradient_bytes: int,
    ) -> "Execution":
        """
        Choose what is left open, by the device.

        Args:
            hidden (`torch.Tensor` of shape `(N, H)`):
                Hidden states.
            weight (`torch.Tensor` of shape `(V, H)`):
                Of the head.
            num_sides (`int`):
                Blocks of logits that exist at once.
            memory_budget (`float`, *optional*):
                MiB, see [`~trl_opsd.objective.fused_divergence`].
            kernel (`str`, *optional*):
                See [`~trl_opsd.objective.fused_divergence`].
            head_gradient_bytes (`int`):
                Bytes of the head's gradient in fp32, 0 if it has none.

        Returns:
            [`Execution`]

        Raises:
            ValueError: If the kernel does not run on this device or in this dtype.
        """
        device, vocabulary = hidden.device, weight.size(0)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        else:
            dtype = torch.promote_types(hidden.dtype, weight.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        if kernel is None:
            kernel = default_kernel(device, vocabulary, wide)
        elif kernel == "triton" and wide != torch.float32:
            raise ValueError(f"`kernel='triton'` computes in fp32, and the inputs are {dtype}. Leave `kernel` unset.")
        elif kernel == "compiled" and device.type != "cpu":
            raise ValueError(f"`kernel='compiled'` is for CPUs, and the inputs are on {device}. Leave `kernel` unset.")
        if memory_budget is None:
            memory_budget = default_memory(device, head_gradient_bytes)
        blocks = Blocks.fit(hidden.size(0), num_sides * vocabulary * wide.itemsize, memory_budget, kernel)
        _log_once(kernel, round(memory_budget), str(device), vocabulary)
        return cls(dtype, wide, kernel, blocks)


def slices(number: int, size: int) -> list[slice]:
    """The parts of `range(number)`, of a size each but the last."""
    return [slice(start, min(start + size, number)) for start in range(0, number, size)]


@cache
def _log_once(kernel: str, memory_budget: int, device: str, vocabulary: int) -> None:
    _logger.info(
        "Divergence over %s tokens on %s: %s kernel, %s MiB for blocks of logits.",
        vocabulary,
        device,
        kernel,
        memory_budget,
    )
