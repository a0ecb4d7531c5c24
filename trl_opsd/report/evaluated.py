"""Evaluations of training runs: what is left of them, and what changed."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..eval.compare import Comparison, compare
from ..eval.run_folder import read_samples
from ..eval.samples import Sample
from ..eval.statistics import Estimate
from .runs import Run, read_json


class Evaluation(NamedTuple):
    """
    One benchmark, evaluated once.

    Args:
        name (`str`):
            What was evaluated.
        benchmark (`str`):
            Name of the benchmark.
        metric (`str`):
            `avg@k`, with the number of completions.
        accuracy (`Estimate`, *optional*):
            Share of right answers. `None` when no problem could be graded.
        mean_tokens (`Estimate`):
            Length of completions.
        truncation_rate (`Estimate`):
            Share of completions that were cut off.
        folder (`Path`, *optional*):
            Folder of the benchmark, if its samples are there.
        scorer (`str`, *optional*):
            Version of the scorer.
    """

    name: str
    benchmark: str
    metric: str
    accuracy: Estimate | None
    mean_tokens: Estimate
    truncation_rate: Estimate
    folder: Path | None
    scorer: str | None

    def samples(self) -> list[Sample]:
        """Its completions, none if they are gone."""
        file = self.folder / "samples.jsonl" if self.folder else None
        return read_samples(file) if file is not None and file.is_file() else []


def in_training(run: Run) -> dict[str, list[Evaluation]]:
    """The first and the last evaluation of each benchmark while a run trained, by benchmark, as they were logged."""
    found: dict[str, list[Evaluation]] = {}
    suffix = "/mean_tokens"
    names = dict.fromkeys(
        name for row in run.log for name in row if name.endswith(suffix) and name.startswith("eval_")
    )
    for name in names:
        benchmark = name.removeprefix("eval_").removesuffix(suffix)
        rows = [row for row in run.log if name in row]
        ends = rows[:1] if len(rows) == 1 else [rows[0], rows[-1]]
        found[benchmark] = [_logged(run, benchmark, row) for row in ends]
    return found


def _logged(run: Run, benchmark: str, row: dict[str, Any]) -> Evaluation:
    prefix = f"eval_{benchmark}/"
    metric = next((name.removeprefix(prefix) for name in row if name.startswith(f"{prefix}avg@")), "avg@k")
    metric = metric.removesuffix("_low").removesuffix("_high")
    accuracy = None
    if f"{prefix}{metric}" in row:
        low, high = (row.get(f"{prefix}{metric}_{end}") for end in ("low", "high"))
        accuracy = Estimate(row[f"{prefix}{metric}"], low, high)
    folder = run.evaluations.get(row["step"])
    return Evaluation(
        f"step {row['step']}",
        benchmark,
        metric,
        accuracy,
        Estimate(row[f"{prefix}mean_tokens"], None, None),
        Estimate(row[f"{prefix}truncation_rate"], None, None),
        None if folder is None else folder / benchmark,
        _scorer(folder),
    )


def afterwards(folder: Path, name: str) -> list[Evaluation]:
    """
    Reads a run of `trl-opsd eval`.

    Args:
        folder (`Path`):
            Its folder.
        name (`str`):
            What to call it.

    Returns:
        `list[Evaluation]`: its finished benchmarks.

    Raises:
        ValueError: If it is none, or what it holds cannot be read.
    """
    if read_json(folder / "run.json") is None:
        raise ValueError(f"{folder} has no run.json: name the folder of a run of `trl-opsd eval`.")
    return [_summed_up(file, name, _scorer(folder)) for file in sorted(folder.glob("*/metrics.json"))]


def _summed_up(file: Path, name: str, scorer: str | None) -> Evaluation:
    try:
        summary = (read_json(file) or {})["summary"]
        accuracy = summary["avg_at_k"]
        return Evaluation(
            name,
            summary["benchmark"],
            f"avg@{max(map(int, summary['pass_at_k']), default='k')}",
            None if accuracy is None else Estimate(**accuracy),
            Estimate(**summary["mean_tokens"]),
            Estimate(**summary["truncation_rate"]),
            file.parent,
            scorer,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} was written by another version of this library: {error!r}.") from error


def _scorer(folder: Path | None) -> str | None:
    record = read_json(folder / "run.json") if folder is not None else None
    return ((record or {}).get("settings") or {}).get("scorer_version")


@cache  # a page asks more than once
def difference(base: Evaluation, new: Evaluation) -> Comparison | str:
    """
    Compares two evaluations of a benchmark, problem by problem, on the problems that both have.

    Args:
        base ([`Evaluation`]):
            The one to compare with.
        new ([`Evaluation`]):
            The other.

    Returns:
        [`~trl_opsd.eval.compare.Comparison`] or `str`: the differences, or why there is nothing to pair.
    """
    if base.scorer != new.scorer:
        return "graded by different versions of the scorer"
    try:
        samples = base.samples(), new.samples()
        if not all(samples):
            return "the samples of one are not there"
        return compare(*samples, common_only=True)
    except ValueError as error:
        return str(error)
