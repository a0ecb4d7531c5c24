"""How many rows of logits exist at once: what fits a budget, and the budget that suits a device."""

import math
from typing import NamedTuple

import torch


MIB = 2**20
# Matrix products of a GPU are as fast as they get from about so many rows on, and in steps of their tiles
_GPU_ROWS = 128
_GPU_BUDGET = 1024.0
_SHARE_OF_FREE_MEMORY = 1 / 4


class Blocks(NamedTuple):
    """
    Rows that go through the matrix products at once, and through the elementwise work at once.

    Args:
        block_rows (`int`):
            Rows of a block of logits.
        slice_rows (`int`):
            Rows of a slice. It divides `block_rows`.
    """

    block_rows: int
    slice_rows: int

    @classmethod
    def fit(cls, num_rows: int, row_bytes: int, memory_budget: float, kernel: str) -> "Blocks":
        """
        As few and as equal blocks as seven eighths of the budget allow; the rest is for everything else.

        The kernels of torch go through a block in slices: their temporaries, up to a dozen of a slice's size, stay
        small, and in a CPU's cache. That of Triton has none.

        Args:
            num_rows (`int`):
                Rows there are.
            row_bytes (`int`):
                Bytes of one row of a block.
            memory_budget (`float`):
                MiB.
            kernel (`str`):
                `"triton"`, `"compiled"` or `"eager"`.

        Returns:
            [`Blocks`]
        """
        budget = memory_budget * MIB
        fitting = max(1, int(budget * 7 / 8 / row_bytes))
        if kernel == "triton":
            unit = min(_GPU_ROWS, _floor_to_power_of_two(fitting))
        elif kernel == "compiled":  # compiled anew for every size, and with half as many temporaries
            unit = _floor_to_power_of_two(budget / 32 / row_bytes)
        else:
            unit = min(_floor_to_power_of_two(budget / 64 / row_bytes), max(1, num_rows))
        most = max(1, fitting // unit)
        num_units = max(1, math.ceil(num_rows / unit))
        block_rows = math.ceil(num_units / math.ceil(num_units / most)) * unit
        if kernel == "triton":
            block_rows = min(block_rows, max(1, num_rows))
            return cls(block_rows, block_rows)
        return cls(block_rows, unit)


def default_memory(device: torch.device, head_gradient_bytes: int, free_bytes: int | None = None) -> float:
    """
    Budget for the divergence where none is set.

    On a GPU, 1 GiB keeps the matrix products efficient for every usual vocabulary. A trained head takes as much as its
    fp32 gradient, if that is more: each block adds to the whole of it, which would otherwise cost more than the
    product. It is halved until it is at most a quarter of the memory that is free. On other devices, 256 MiB.

    Args:
        device (`torch.device`):
            Where the divergence is computed.
        head_gradient_bytes (`int`):
            Bytes of the head's gradient in fp32, 0 if it is frozen.
        free_bytes (`int`, *optional*):
            Memory that is free. `None` asks the device.

    Returns:
        `float`: MiB.
    """
    if device.type != "cuda":
        return 256.0
    budget = max(_GPU_BUDGET, head_gradient_bytes * 8 / 7 / MIB)
    if free_bytes is None:
        free_bytes, _ = torch.cuda.mem_get_info(device)
        if _SHARE_OF_FREE_MEMORY * free_bytes < budget * MIB:  # PyTorch's cache is free too, but takes longer to ask
            free_bytes += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # Halves, so that a little more or less free memory does not change the order of a sum
    while budget * MIB > _SHARE_OF_FREE_MEMORY * free_bytes and budget > 64.0:
        budget /= 2
    return budget


def _floor_to_power_of_two(number: float) -> int:
    return 2 ** (int(max(1, number)).bit_length() - 1)
