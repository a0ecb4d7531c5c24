"""The folder of a run: what was asked, every completion, and the data set."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import whole_folder, write_whole


COMPLETIONS, TEACHER_COMPLETIONS = "completions.jsonl", "teacher_completions.jsonl"
_MISSING = object()


def open_folder(folder: Path, settings: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """
    Begin a run in a folder, or take up the one that is there.

    Args:
        folder (`Path`):
            Folder of the run.
        settings (`Mapping[str, Any]`):
            What a run is only taken up with the same of.
        others (`Mapping[str, Any]`):
            What else `run.json` says.

    Raises:
        ValueError: If the folder holds a run with other settings, or with unknown ones.
    """
    record, completions = folder / "run.json", folder / COMPLETIONS
    way_out = "Choose another `output_dir`, or delete that folder."
    settings = json.loads(json.dumps(settings))
    # A run that ended before its first completion binds nobody
    if completions.exists() and completions.stat().st_size:
        try:
            earlier = dict(json.loads(record.read_text(encoding="utf-8"))["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{record} does not say how {completions} was made ({error!r}). {way_out}") from error
        different = [
            f"`{name}` was {earlier.get(name)!r} and is {settings.get(name)!r}"
            for name in dict.fromkeys([*earlier, *settings])
            if earlier.get(name, _MISSING) != settings.get(name, _MISSING)
        ]
        if different:
            raise ValueError(f"{folder} holds a run with other settings: {'; '.join(different)}. {way_out}")
    write_whole(
        record, json.dumps({"settings": settings, "other_fields": others}, indent=2, ensure_ascii=False) + "\n"
    )


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
