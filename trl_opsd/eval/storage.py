"""Samples on disk: one JSON object per line."""

import json
import logging
from dataclasses import fields
from pathlib import Path

from .samples import Sample


logger = logging.getLogger(__name__)

_FIELDS = {field.name for field in fields(Sample)}


def read_samples(path: Path) -> list[Sample]:
    """
    Reads samples. A last line that was cut off while it was written is dropped, with a warning.

    Args:
        path (`Path`):
            The file.

    Returns:
        `list[Sample]`:
            Its samples, in order.

    Raises:
        `ValueError`: If a line does not hold the fields of a sample.
    """
    samples = []
    *lines, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if torn:
        logger.warning(f"{path}: 1 line, the last, was cut off and is dropped.")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict) or row.keys() != _FIELDS:
            differing = sorted(_FIELDS ^ set(row))
            raise ValueError(f"{path}, line {number}: missing or unknown fields {', '.join(differing)}.")
        samples.append(Sample(**row))
    return samples
