"""torch.compile, where it works and where it pays."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException


class Compiled:
    """
    A function compiled when it is first called, and left as it is from the first failure to compile on.

    Args:
        function (`Callable`):
            Function to compile.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._compiled = torch.compile(function, dynamic=False, fullgraph=True)
        self._failed = False

    def __call__(self, *args: Any) -> Any:
        if not self._failed:
            try:
                return self._compiled(*args)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                self._failed = True
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(
                    f"torch.compile failed ({type(error).__name__}: {reason}). The divergence runs uncompiled from "
                    "here on: correct, but slower. Install a C++ compiler (Triton on a GPU) to compile it.",
                    stacklevel=2,
                )
        return self._function(*args)
