"""Memory for the large temporaries of a CPU. Elsewhere PyTorch's caching allocator is all it takes."""

import mmap
from contextlib import suppress
from functools import cache

import torch


def empty_block(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """
    Uninitialised tensor that is about to be filled from end to end.

    On the CPU it lies in huge pages where the system has them: mapping hundreds of MiB by 4 KiB takes longer than
    filling them.

    Args:
        num_rows (`int`):
            Rows.
        num_columns (`int`):
            Columns.
        dtype (`torch.dtype`):
            Dtype.
        device (`torch.device`):
            Device.

    Returns:
        `torch.Tensor` of shape `(num_rows, num_columns)`.
    """
    num_bytes = num_rows * num_columns * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_rows, num_columns, dtype=dtype, device=device)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system built without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(num_rows, num_columns)


@cache
def reuse_freed_memory() -> None:
    """
    Let the GNU C library keep blocks of up to 32 MiB for the next allocation.

    It gives large blocks back to the system when they are freed, and a kernel's temporaries would be mapped, and every
    page of them faulted in, for each slice again: half of the elementwise time. Once it has seen a block of nearly 32
    MiB come and go, it no longer does so.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
