"""The folder of a run: what was asked, every sample as soon as it is graded, and how far an earlier run came."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..files import LineFile, write_whole
from .samples import Sample
from .scorer import score


logger = logging.getLogger(__name__)

_MISSING = object()
_FIELDS = {field.name for field in fields(Sample)}


def open_run(folder: Path, settings: Mapping[str, Any], details: Mapping[str, Any], overwrite: bool = False) -> None:
    """
    Begins a run in a folder, or takes up the one that is there. If only the version of the scorer has changed since,
    its samples are graded anew.

    Args:
        folder (`Path`):
            Folder of the run.
        settings (`Mapping[str, Any]`):
            What samples depend on. A run is only taken up with the same, but for `scorer_version`.
        details (`Mapping[str, Any]`):
            What else `run.json` says, e.g. versions.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to delete an earlier run first.

    Raises:
        ValueError: If the folder holds a run with other settings, or with unknown ones.
    """
    record = folder / "run.json"
    samples = [file for file in folder.glob("*/samples.jsonl") if file.stat().st_size > 0]
    # One that ended before its first sample binds nobody
    if overwrite or (record.exists() and not samples):
        begun = folder.glob("*/problems.jsonl") if record.exists() else ()
        for benchmark in {file.parent for file in (*samples, *begun)}:
            for name in (
                "problems.jsonl",
                "samples.jsonl",
                "samples.parquet",
                "metrics.json",
                "accuracy.png",
                "lengths.png",
            ):
                (benchmark / name).unlink(missing_ok=True)
        samples = []
        record.unlink(missing_ok=True)
    settings = json.loads(json.dumps(settings))
    if record.exists():
        try:
            earlier = dict(json.loads(record.read_text(encoding="utf-8"))["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{record} does not say how the samples beside it were made ({error!r}). Choose another `output_dir`, "
                "or set `overwrite` to delete that run."
            ) from error
        different = {
            name: f"{name} was {earlier.get(name)!r} and is {settings.get(name)!r}"
            for name in dict.fromkeys([*earlier, *settings])
            if earlier.get(name, _MISSING) != settings.get(name, _MISSING)
        }
        if different.keys() == {"scorer_version"}:
            # All before the first is written, or one that is stopped meanwhile would leave verdicts of two versions
            for file, rows in [(file, _graded_anew(file)) for file in samples]:
                for name in ("samples.parquet", "metrics.json", "accuracy.png"):
                    (file.parent / name).unlink(missing_ok=True)
                write_whole(file, "".join(f"{_line(asdict(row))}\n" for row in rows))
        elif different:
            raise ValueError(
                f"{folder} holds a run with other settings: {'; '.join(different.values())}. Choose another "
                "`output_dir`, or set `overwrite` to delete that run."
            )
    elif samples:
        raise ValueError(
            f"{folder} has samples, but no run.json that says how they were made. Choose another `output_dir`, or set "
            "`overwrite` to delete them."
        )
    write_json(record, {"settings": settings, **details})


def _graded_anew(file: Path) -> list[Sample]:
    from rich.progress import track

    problems = map(json.loads, (file.parent / "problems.jsonl").read_bytes().splitlines())
    types = {problem["problem_id"]: problem["answer_type"] for problem in problems}
    samples = read_samples(file)
    description = f"{file.parent.name}: the scorer has changed, grading {len(samples):,} completions anew"
    return [
        replace(sample, **asdict(score(sample.completion, sample.reference, types[sample.problem_id])))
        for sample in track(samples, description)
    ]


def keep_problems(file: Path, problems: Iterable[Mapping[str, Any]]) -> None:
    """
    Writes down the problems, or checks that they are those an earlier run wrote down.

    Args:
        file (`Path`):
            `problems.jsonl` of a benchmark.
        problems (`Iterable[Mapping[str, Any]]`):
            Problems, each with a `problem_id`.

    Raises:
        ValueError: If a problem has changed.
    """
    known = {}
    if file.exists():
        known = {row["problem_id"]: row for row in map(json.loads, file.read_bytes().splitlines())}
    problems = list(problems)
    asked = {problem["problem_id"] for problem in problems}
    # Fewer problems and more of them are both from the beginning, so one is part of the other
    if (gone := known.keys() - asked) and asked - known.keys():
        raise ValueError(
            f"{file} was written for other problems, such as {min(gone)}. Choose another `output_dir`, or set "
            "`overwrite` to delete the earlier run."
        )
    for problem in problems:
        problem_id = problem["problem_id"]
        for name, value in known.setdefault(problem_id, dict(problem)).items():
            if problem[name] != value:
                raise ValueError(
                    f"Problem {problem_id} is not what it was when {file} was written: `{name}` was {value!r} and is "
                    f"{problem[name]!r}. Choose another `output_dir`, or set `overwrite` to delete the earlier run."
                )
    write_whole(file, "".join(f"{_line(row)}\n" for row in known.values()))


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


class SampleFile:
    """
    The samples of a benchmark, one JSON object per line. Each is on disk before the next is generated.

    A line that was cut off when a run was killed is removed.

    Args:
        file (`Path`):
            `samples.jsonl` of a benchmark.

    Raises:
        ValueError: If a line is no sample, or a sample is there twice.
    """

    def __init__(self, file: Path):
        self._path = file
        self.samples: list[Sample] = []
        """Samples in the file, in the order in which they were written."""
        self._file = LineFile(file)
        seen = set()
        for number, sample in enumerate(read_samples(file), 1):
            if (sample.problem_id, sample.sample_index) in seen:
                raise ValueError(
                    f"Line {number} of {file} has sample {sample.sample_index} of problem {sample.problem_id} a "
                    "second time. Did two runs write at once? Remove one of the two, and run again."
                )
            seen.add((sample.problem_id, sample.sample_index))
            self.samples.append(sample)

    def append(self, sample: Sample) -> None:
        """
        Writes a sample.

        Args:
            sample ([`Sample`]):
                Sample to write.

        Raises:
            OSError: If it cannot be written. Those before it are kept.
        """
        self._file.append(_line(asdict(sample)))
        self.samples.append(sample)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def write_json(file: Path, value: Any) -> None:
    """
    Writes JSON in one piece: the file is either the old one or the new one.

    Args:
        file (`Path`):
            File to write.
        value (`Any`):
            What goes into it. Dataclasses become objects.
    """
    write_whole(file, json.dumps(value, indent=2, ensure_ascii=False, default=asdict, allow_nan=False) + "\n")


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)
