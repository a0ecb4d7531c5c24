from .columns import to_prompts
from .loading import load_rows
from .validation import validate_rows


__all__ = ["load_rows", "to_prompts", "validate_rows"]
