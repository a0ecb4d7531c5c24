from .columns import to_prompts
from .images import (
    IMAGE_COLUMNS,
    TEACHER_IMAGES,
    image_columns,
    image_parts,
    images_of,
    prompt_of,
    prompts_of,
    teacher_images_of,
    undecoded,
)
from .loading import load_rows
from .template import Template
from .validation import validate_rows


__all__ = [
    "IMAGE_COLUMNS",
    "TEACHER_IMAGES",
    "Template",
    "image_columns",
    "image_parts",
    "images_of",
    "load_rows",
    "prompt_of",
    "prompts_of",
    "teacher_images_of",
    "to_prompts",
    "undecoded",
    "validate_rows",
]
