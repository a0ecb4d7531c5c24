"""What people look at: prompt previews, tables and plots."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .in_training import InspectCallback
    from .prompt_preview import PromptPreviewCallback


__all__ = ["InspectCallback", "PromptPreviewCallback"]

_MODULES = {"InspectCallback": "in_training", "PromptPreviewCallback": "prompt_preview"}


# They need transformers, whose seconds of loading the tables of an evaluation must not cost.
def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
