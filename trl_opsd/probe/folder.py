"""The folder of a probe: what was asked, what was measured, and what it says."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_whole
from .measure import RECORDS


_MISSING = object()


def open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """
    Begin a probe in a folder, or take up the one that is there.

    Args:
        folder (`Path`):
            Folder of the probe.
        settings (`Mapping[str, Any]`):
            What a probe is only taken up with the same of.

    Raises:
        ValueError: If the folder holds a probe with other settings, or with unknown ones.
    """
    record, records = folder / "settings.json", folder / RECORDS
    way_out = "Choose another `--probe_dir`, or delete that folder."
    settings = json.loads(json.dumps(settings, default=str))
    # One that ended before its first row binds nobody
    if records.exists() and records.stat().st_size:
        try:
            earlier = dict(json.loads(record.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{record} does not say how {records} was made ({error!r}). {way_out}") from error
        different = [
            f"`{name}` was {earlier.get(name)!r} and is {settings.get(name)!r}"
            for name in dict.fromkeys([*earlier, *settings])
            if earlier.get(name, _MISSING) != settings.get(name, _MISSING)
        ]
        if different:
            raise ValueError(f"{folder} holds a probe with other settings: {'; '.join(different)}. {way_out}")
    write_whole(record, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
