"""What people look at: prompt previews, tables and plots."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .prompt_preview import PromptPreviewCallback


__all__ = ["PromptPreviewCallback"]


# The preview needs transformers, whose seconds of loading the tables of an evaluation must not cost.
def __getattr__(name: str) -> Any:
    if name != "PromptPreviewCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .prompt_preview import PromptPreviewCallback

    return PromptPreviewCallback
