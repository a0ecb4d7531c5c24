"""Files and folders that several processes may want."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


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
