import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, get_dataset_config_names, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError


_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Written by `datasets` beside the data; they describe it and hold no rows.
_METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def load_rows(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
) -> Dataset | IterableDataset:
    """
    Load the rows of one dataset split.

    Args:
        name (`str`):
            A local `.json`, `.jsonl`, `.csv` or `.parquet` file, a folder of such files (one format per folder, splits
            told apart by file name as [`~datasets.load_dataset`] does), a folder written by `save_to_disk`, or a
            dataset id on the Hub. What exists locally is never looked up on the Hub.
        config (`str`, *optional*):
            Name of the dataset's configuration.
        split (`str`, *optional*, defaults to `"train"`):
            Split to load. A single file is the split `"train"`. Slices such as `"train[:90%]"` work too, except for
            streaming and for folders written by `save_to_disk`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read the rows as they are needed instead of all at once.
        revision (`str`, *optional*):
            Branch, tag or commit of a dataset on the Hub.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]:
            The rows, at least one.

    Raises:
        `ValueError`: for a path that does not exist, an unknown split or configuration, unreadable data, or no rows.

    Example:
    ```python
    >>> from trl_opsd.data import load_rows

    >>> load_rows("problems.jsonl")
    Dataset({
        features: ['problem', 'solution'],
        num_rows: 1000
    })
    ```
    """
    path = Path(name).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        dataset = _load_saved(path, split, streaming)
    else:
        source = _source(name, path, any_format=config is not None)
        if revision is not None and not path.exists():
            source["revision"] = revision
        try:
            dataset = load_dataset(**source, name=config, split=split, streaming=streaming)
        # `datasets` leaks this one for files that are empty.
        except StopIteration:
            raise _no_rows(name, split) from None
        except DatasetGenerationError as error:
            raise ValueError(f"Cannot read {name}: {error.__cause__ or error}") from error
        except OSError as error:
            if path.exists():
                raise ValueError(f"Cannot read {name}: {error}") from error
            raise ValueError(
                f"{name!r} is not a file or folder in {Path.cwd()}, and loading it from the Hub failed: {error}"
            ) from error
        except ValueError as error:
            raise _explained(error, name, path, source, config, split) from error
    try:
        # A stream has no length, and finds out only now that a file cannot be read.
        next(iter(dataset))
    except StopIteration:
        raise _no_rows(name, split) from None
    except ValueError as error:
        raise ValueError(f"Cannot read {name}: {error}") from error
    return dataset


def _load_saved(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    saved = load_from_disk(str(path))
    if isinstance(saved, Dataset):
        saved = DatasetDict({str(saved.split or "train"): saved})
    if split not in saved:
        raise ValueError(f"{path} has no split {split!r}, only: {_listed(saved)}.")
    return saved[split].to_iterable_dataset() if streaming else saved[split]


def _source(name: str, path: Path, *, any_format: bool) -> dict[str, str]:
    kind = _FORMATS.get(path.suffix.lower())
    if path.is_file():
        if kind is None:
            raise ValueError(f"Cannot read the file {path}: expected one of {_listed(_FORMATS)}.")
        return {"path": kind, "data_files": str(path)}
    if path.is_dir():
        if not any_format:
            _check_one_format(path)
        # A bare folder name such as "data" would read as a Hub id too.
        return {"path": str(path.resolve())}
    if kind is not None or not _HUB_ID.fullmatch(name):
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        raise ValueError(f"There is no file or folder {path}. {folder} holds: {_listed_entries(folder)}.")
    return {"path": name}


def _check_one_format(folder: Path) -> None:
    counts = Counter(
        _FORMATS[file.suffix.lower()]
        for file in folder.rglob("*")
        if file.suffix.lower() in _FORMATS and file.name not in _METADATA_FILES
    )
    if not counts:
        raise ValueError(
            f"The folder {folder} has no file in one of the formats {_listed(_FORMATS)}. It holds: "
            f"{_listed_entries(folder)}."
        )
    if len(counts) > 1:
        # `datasets` would read the most frequent format and leave the others out without a word.
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        raise ValueError(f"The folder {folder} mixes formats ({found}). Keep one of them, or name a single file.")


def _explained(
    error: ValueError, name: str, path: Path, source: dict[str, str], config: str | None, split: str
) -> ValueError:
    message = str(error)
    if "corresponds to no data" in message:
        return _no_rows(name, split)
    if "BuilderConfig" in message or "Config name is missing" in message:
        known = _listed(get_dataset_config_names(source["path"]))
        return ValueError(f"The dataset {name} has no configuration {config!r}, only: {known}.")
    if message.startswith(("Unknown split", "Bad split", "Unrecognized instruction")):
        hint = " Put train.jsonl and test.jsonl into one folder to have both." if path.is_file() else ""
        return ValueError(f"The dataset {name} has no split {split!r}. {message}{hint}")
    return ValueError(f"Cannot read {name}: {message}")


def _no_rows(name: str, split: str) -> ValueError:
    return ValueError(f"The dataset {name}, split {split!r}, has no rows.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _listed_entries(folder: Path) -> str:
    entries = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return _listed(entries[:10]) + (f" and {len(entries) - 10} more" if len(entries) > 10 else "") or "nothing"
