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
        self._failed = self._warned = False

    def __call__(self, *args: Any) -> Any:
        if not self._failed:
            try:
                return self._compiled(*args)
            except FailOnRecompileLimitHit:
                self._warn_once(
                    "The divergence has been compiled for as many cases as `torch._dynamo.config.recompile_limit` "
                    "allows. Further ones run uncompiled: correct, but slower."
                )
            except TorchDynamoException as error:
                self._failed = True
                reason = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
                self._warn_once(
                    f"torch.compile failed ({type(error).__name__}: {reason}). The divergence runs uncompiled from "
                    "here on: correct, but slower. Install a C++ compiler (Triton on a GPU) to compile it."
                )
        return self._function(*args)

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=3)
