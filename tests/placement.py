"""Puts what the tests make on the device that they run on."""

import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode


_TESTS = str(Path(__file__).parent)
_MAKING = {
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.rand,
    torch.randint,
    torch.randn,
    torch.randperm,
    torch.tensor,
    torch.zeros,
}


def place(module: torch.nn.Module) -> torch.nn.Module:
    """The module on the device of the tests."""
    return module.to(torch.empty(0).device)


class Placement(TorchFunctionMode):
    """
    A tensor that a file of these tests makes, and no other, is made on the CPU and moved to `device`, unless the call
    names a device. So a seed gives the same numbers everywhere, and what the library makes stays where the library
    puts it.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        by_a_test = func in _MAKING and sys._getframe(1).f_code.co_filename.startswith(_TESTS)
        if not by_a_test or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        trained = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).to(self._device).requires_grad_(trained)
