from .prompt_preview import PromptPreviewCallback


__all__ = ["PromptPreviewCallback"]
