"""What a training run has left in its folder, read without loading a model."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ..files import TRAINING_RECORD


_LOG = "trainer_state.json"


class Session(NamedTuple):
    """
    A run, from where it was begun or resumed.

    Args:
        step (`int`):
            Optimizer steps that had been done.
        time (`str`):
            When it was.
        settings (`dict[str, Any]`):
            All settings.
        defaults (`dict[str, Any]`):
            The method's defaults of those that were given another value.
        versions (`dict[str, str | None]`):
            Versions of packages.
        devices (`str`):
            Number and kind of the devices.
        guards (`list[str]`):
            What guards said.
    """

    step: int
    time: str
    settings: dict[str, Any]
    defaults: dict[str, Any]
    versions: dict[str, str | None]
    devices: str
    guards: list[str]


@dataclass(frozen=True)
class Run:
    """
    A training run.

    Args:
        name (`str`):
            What it is called among those that are shown.
        folder (`Path`):
            Its output folder.
        log (`list[dict[str, Any]]`):
            What was logged, each entry with its `step`.
        step (`int`):
            Optimizer steps done when the log was written.
        max_steps (`int`):
            Steps it is to have.
        written (`datetime`, *optional*):
            When the log was written. `None` if there is none yet.
        method (`dict[str, str]`, *optional*):
            Name, paper, title and citation of its method.
        config (`str`, *optional*):
            Class of its configuration. `None` if the run has not said what it is.
        summary (`list[tuple[str, str]]`):
            Who trains whom.
        sessions (`list[Session]`):
            Its beginning, and each time it was resumed.
        evaluations (`dict[int, Path]`):
            Folders of the evaluations while it trained, by step.
        later_evaluations (`list[Path]`):
            Folders of `trl-opsd eval` inside its own.
    """

    name: str
    folder: Path
    log: list[dict[str, Any]]
    step: int
    max_steps: int
    written: datetime | None
    method: dict[str, str] | None
    config: str | None
    summary: list[tuple[str, str]]
    sessions: list[Session]
    evaluations: dict[int, Path]
    later_evaluations: list[Path]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """
        A metric over the run.

        Args:
            name (`str`):
                Its name in the log.

        Returns:
            `tuple[list[int], list[float]]`: steps and finite values of the entries that have it.
        """
        pairs = [(row["step"], row[name]) for row in self.log if _is_number(row.get(name))]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def last(self, name: str) -> float | None:
        """The last value of a metric, if there is one."""
        _, values = self.series(name)
        return values[-1] if values else None

    @property
    def is_finished(self) -> bool:
        """Whether its last step has been done."""
        return 0 < self.max_steps <= self.step

    @property
    def inspected(self) -> list[Path]:
        """Pages of inspected rollouts that it wrote, in the order of the steps."""
        return sorted(self.folder.glob("inspect/step-*.html"), key=_number)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """
    Reads runs, finished or not.

    Args:
        folders (`Sequence[Path]`):
            Their output folders, or checkpoints of theirs.

    Returns:
        `list[Run]`: the runs, called by the last part of their folders that differs.

    Raises:
        ValueError: If a folder is none of a run, or comes twice, or what it holds cannot be read.
    """
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise ValueError(f"{folder} is named twice. Name each run once.")
    return [_read(folder, name) for folder, name in zip(resolved, _names(resolved), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    for parts in range(1, max((len(folder.parts) for folder in folders), default=0)):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return list(map(str, folders))


def _read(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Name the `output_dir` of a training run.")
    home = folder.parent if folder.name.startswith("checkpoint-") else folder
    log_file, record = _log_file(folder), read_json(home / TRAINING_RECORD) or {}
    if log_file is None and not record:
        raise ValueError(
            f"{folder} is no training run: it holds neither {TRAINING_RECORD} nor {_LOG}, nor a checkpoint with one."
            f"{_hint(folder)}"
        )
    log, step, max_steps = ([], 0, 0) if log_file is None else _read_log(log_file)
    try:
        sessions = [Session(**session) for session in record.get("sessions", [])]
        summary = [(str(key), str(value)) for key, value in record.get("summary", [])]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{home / TRAINING_RECORD} was written by another version of this library: {error}."
        ) from error
    return Run(
        name=name,
        folder=home,
        log=log,
        step=step,
        max_steps=max_steps,
        written=None if log_file is None else datetime.fromtimestamp(log_file.stat().st_mtime),
        method=record.get("method"),
        config=record.get("config"),
        summary=summary,
        sessions=sessions,
        evaluations={_number(path): path for path in sorted(home.glob("eval/step-*"), key=_number) if path.is_dir()},
        later_evaluations=_evaluations(home),
    )


def _log_file(folder: Path) -> Path | None:
    """The run's own, or else that of its newest checkpoint."""
    checkpoints = sorted(folder.glob(f"checkpoint-*/{_LOG}"), key=lambda file: _number(file.parent))
    files = [folder / _LOG] if (folder / _LOG).is_file() else checkpoints[-1:]
    return files[0] if files else None


def _read_log(file: Path) -> tuple[list[dict[str, Any]], int, int]:
    state = read_json(file) or {}
    log = state.get("log_history")
    if not isinstance(log, list) or not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in log):
        raise ValueError(
            f"{file} has no `log_history` of entries with a `step`. It was not written by a trainer of transformers, "
            "or by a version of it that is not known here."
        )
    last = max((row["step"] for row in log), default=0)
    step, max_steps = (state.get(name) for name in ("global_step", "max_steps"))
    return log, step if isinstance(step, int) else last, max_steps if isinstance(max_steps, int) else 0


def read_json(file: Path) -> dict[str, Any] | None:
    """
    Reads an object.

    Args:
        file (`Path`):
            File with JSON.

    Returns:
        `dict[str, Any]`, *optional*: the object, if there is a file.

    Raises:
        ValueError: If it holds anything else.
    """
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds {type(value).__name__}, not an object.")
    return value


def _hint(folder: Path) -> str:
    if (folder / "run.json").is_file():
        return " It is an evaluation: see `--eval`, and `trl-opsd compare` for two of them."
    inside = [path for path in _folders(folder) if (path / TRAINING_RECORD).is_file() or _log_file(path)]
    return f" Did you mean {inside[0]}?" if inside else ""


def _evaluations(folder: Path) -> list[Path]:
    """Those of `trl-opsd eval`: the ones while training are called `eval/step-<step>`."""
    places = [*_folders(folder), *_folders(folder / "eval")]
    is_later = (path for path in places if not (path.parent.name == "eval" and path.name.startswith("step-")))
    return [path for path in is_later if (path / "run.json").is_file()]


def _folders(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
