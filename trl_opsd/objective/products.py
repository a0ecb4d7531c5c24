"""
The three vocabulary-sized matrix products, into memory that is already there.

Half-precision operands are multiplied as such, but summed and kept in fp32. A weight of another dtype is converted one
tile of rows at a time, so that no second copy of it exists.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch


TILE_ELEMENTS = 2**23


def project(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, dtype: torch.dtype) -> None:
    """
    out = hidden · weightᵀ.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Hidden states.
        weight (`torch.Tensor` of shape `(V, H)`):
            Projection.
        out (`torch.Tensor` of shape `(N, V)`):
            Result, fp32 (fp64 for fp64 operands).
        dtype (`torch.dtype`):
            Dtype of the operands.
    """
    for tile in _tiles(weight, whole=_is_operand(weight, out, dtype)):
        _multiply(hidden, weight[tile].t(), out[:, tile], dtype, accumulate=False)


def project_back(grad: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, dtype: torch.dtype) -> None:
    """out = grad · weight, with `grad` of shape `(N, V)` and `out` of shape `(N, H)`. See [`project`]."""
    for tile in _tiles(weight, whole=_is_operand(weight, out, dtype)):
        _multiply(grad[:, tile], weight[tile], out, dtype, accumulate=tile.start > 0)


def add_outer(grad: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor, dtype: torch.dtype, first: bool) -> None:
    """total += gradᵀ · hidden, with `total` of shape `(V, H)`, which need not be initialised if `first`."""
    for tile in _tiles(total, whole=_is_operand(grad, total, dtype)):
        _multiply(grad[:, tile].t(), hidden, total[tile], dtype, accumulate=not first)


def _is_operand(tensor: torch.Tensor, out: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a product with result `out` can take the tensor as it is."""
    return tensor.dtype == dtype and (dtype == out.dtype or out.is_cuda)


def _tiles(tensor: torch.Tensor, whole: bool) -> Iterator[slice]:
    num_rows = tensor.size(0)
    if whole:
        yield slice(0, num_rows)
        return
    step = max(1, TILE_ELEMENTS // tensor.size(1))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, dtype: torch.dtype, accumulate: bool) -> None:
    if dtype != out.dtype and out.is_cuda:
        a, b = a.to(dtype), b.to(dtype)
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    # Elsewhere a product with fp32 result takes fp32 operands. The values of half-precision ones stay as they are
    with _bf16_products() if dtype == torch.bfloat16 and out.device.type == "cpu" else nullcontext():
        a, b = a.to(dtype).to(out.dtype), b.to(dtype).to(out.dtype)
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)


@contextmanager
def _bf16_products() -> Iterator[None]:
    """Let fp32 products run on bf16 hardware, where a CPU has it: exact for operands that hold bf16 values."""
    settings = cast(Any, torch.backends.mkldnn).matmul  # unknown to PyTorch's annotations
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
