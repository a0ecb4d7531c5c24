from .columns import to_prompts
from .loading import load_rows
from .template import Template
from .validation import validate_rows


__all__ = ["Template", "load_rows", "to_prompts", "validate_rows"]
