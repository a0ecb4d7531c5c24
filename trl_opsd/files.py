"""Files and folders that are whole or not there, and that one run at a time works in."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


# In the output folder of a training run: what it is
TRAINING_RECORD = "training_run.json"
_MISSING = object()


@contextmanager
def locked(folder: Path, name: str = ".lock") -> Iterator[None]:
    """
    Keeps other runs out of a folder.

    Args:
        folder (`Path`):
            Folder of a run.
        name (`str`, *optional*, defaults to `".lock"`):
            Name of the lock in it.

    Raises:
        ValueError: If another run works in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / name).acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"Another run works in {folder}. Wait for its end, or choose another `output_dir`."
        ) from error
    with lock:
        yield


def write_whole(file: Path, text: str) -> None:
    """
    Write a file whole or not at all, whenever the process dies. What was there is replaced in one go.

    Args:
        file (`Path`):
            File to write. Folders it lacks are made.
        text (`str`):
            Its content.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())  # or a machine that fails could keep the name and lose the content
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


class LineFile:
    """
    A file of lines, each on disk before the next is written. What is left of a line that was cut off when a run was
    killed is removed.

    Args:
        file (`Path`):
            File to go on with. It is made, with the folders it lacks, if it is not there.
    """

    def __init__(self, file: Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what `append` has written is out of this process, and nothing is left over after an error
        self._file = file.open("a+b", buffering=0)
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def append(self, line: str) -> None:
        """
        Write a line.

        Args:
            line (`str`):
                The line, without its end.

        Raises:
            OSError: If it cannot be written. Those before it are kept.
        """
        rest = f"{line}\n".encode()
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """
    Write a folder whole or not at all. What was there is replaced.

    Args:
        folder (`Path`):
            Folder to write.

    Yields:
        `Path`: an empty folder beside it, to write to, which gets its name when the block ends without an error.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def take_up(record: Path, data: Path, settings: Mapping[str, Any], way_out: str, **others: Any) -> None:
    """
    Begin what is written row by row into a folder, or take up what is there.

    Args:
        record (`Path`):
            JSON file that says how `data` is made.
        data (`Path`):
            File of rows. Without a row, what was asked before binds nobody.
        settings (`Mapping[str, Any]`):
            What it is only taken up with the same of.
        way_out (`str`):
            What to do about others.
        **others (`Any`):
            What else the file says.

    Raises:
        ValueError: If the rows were made with other settings, or with unknown ones.
    """
    settings = json.loads(json.dumps(settings, default=str))
    if data.exists() and data.stat().st_size:
        try:
            earlier = dict(json.loads(record.read_text(encoding="utf-8"))["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{record} does not say how {data} was made ({error!r}). {way_out}") from error
        different = [
            f"`{name}` was {earlier.get(name)!r} and is {settings.get(name)!r}"
            for name in dict.fromkeys([*earlier, *settings])
            if earlier.get(name, _MISSING) != settings.get(name, _MISSING)
        ]
        if different:
            raise ValueError(f"{data.parent} holds a run with other settings: {'; '.join(different)}. {way_out}")
    write_whole(record, json.dumps({"settings": settings, **others}, indent=2, ensure_ascii=False) + "\n")


def recipes_folder() -> Path:
    """Where the recipes are: inside the installed package, beside it in a checkout."""
    package = Path(__file__).parent
    shipped = package / "recipes"
    return shipped if shipped.is_dir() else package.parent / "recipes"
