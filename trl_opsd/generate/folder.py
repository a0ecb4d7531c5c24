"""The folder of a run: what was asked, every completion, and the data set."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import whole_folder


COMPLETIONS, TEACHER_COMPLETIONS = "completions.jsonl", "teacher_completions.jsonl"


def write_dataset(folder: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """
    Write the data set, whole or not at all, into a folder of its own that commands of TRL take as `dataset_name`.

    Args:
        folder (`Path`):
            Folder of the run.
        records (`Iterable[Mapping[str, Any]]`):
            Rows of the data set.

    Returns:
        `Path`:
            The folder of the data set.
    """
    with whole_folder(folder / "data") as partial, (partial / "train.jsonl").open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    return folder / "data"
