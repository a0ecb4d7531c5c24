"""The kernels there are for the elementwise work, and which one runs."""

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch

from .compilation import Compiled
from .kernel import divergence_kernel


KERNELS = ("triton", "compiled", "eager")
# Below, compiling takes longer than it saves.
_MIN_COMPILED_VOCABULARY = 2**13


def default_kernel(device: torch.device, vocabulary: int, dtype: torch.dtype = torch.float32) -> str:
    """
    Name of the kernel that runs where none is asked for.

    Args:
        device (`torch.device`):
            Where.
        vocabulary (`int`):
            V.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the elementwise work: fp32, or fp64 for fp64 inputs.

    Returns:
        `str`: `"triton"` on a GPU (`"eager"` in fp64, or where Triton does not work), on a CPU `"compiled"` from a
        vocabulary of 8,192 on, else `"eager"`.
    """
    if device.type == "cuda":
        return "triton" if dtype == torch.float32 and _triton_works(device) else "eager"
    return "compiled" if device.type == "cpu" and vocabulary >= _MIN_COMPILED_VOCABULARY else "eager"


def load_kernel(name: str) -> Callable[..., torch.Tensor]:
    """
    A kernel by its name. All take the arguments of [`divergence_kernel`].

    Args:
        name (`str`):
            One of `KERNELS`.

    Returns:
        `Callable`: the kernel.

    Raises:
        ValueError: If there is no such kernel.
    """
    if name not in KERNELS:
        raise ValueError(f"`kernel` must be one of {list(KERNELS)}, got {name!r}.")
    if name == "triton":
        from .triton_kernel import triton_divergence_kernel

        return triton_divergence_kernel
    return compiled_kernel() if name == "compiled" else divergence_kernel


@cache
def compiled_kernel() -> Compiled:
    """The kernel of torch under torch.compile, once for all calls."""
    return Compiled(divergence_kernel)


@cache
def _triton_works(device: torch.device) -> bool:
    # Found out on a few numbers, so that no launch in the middle of a loss has to be doubted
    reason = "Triton is not installed"
    if find_spec("triton") is not None:
        try:
            from .triton_kernel import smoke_test

            smoke_test(device)
            return True
        except Exception as error:
            reason = f"Triton failed ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    warnings.warn(
        f"{reason}. The divergence runs in plain PyTorch on {device}: correct, but several times slower. Install the "
        "Triton that your PyTorch needs, and a C compiler.",
        stacklevel=2,
    )
    return False
