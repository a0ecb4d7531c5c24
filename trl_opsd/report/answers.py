"""What was written for the same prompts, before and after."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..eval.compare import Comparison
from .evaluated import Evaluation
from .runs import Run


class Answers(NamedTuple):
    """
    What was written for one prompt, by what wrote it.

    Args:
        title (`str`):
            What to call it: the problem, where it is short.
        prompt (`str`):
            The prompt, empty if the title says it.
        answer (`str`):
            The right answer, empty if it is not known.
        written (`list[tuple[str, str, str]]`):
            Of each: what wrote it, what is said of it, such as its reward, and the text.
    """

    title: str
    prompt: str
    answer: str
    written: list[tuple[str, str, str]]


def choose(comparison: Comparison, number: int = 2) -> list[str]:
    """Problems to show: the first of those that improved, of those that got worse, and of those that did neither."""
    kinds = ("improved", "worse", "same")
    return [
        change.problem_id
        for kind in kinds
        for change in [change for change in comparison.changes if change.change == kind][:number]
    ]


def answers(evaluations: Sequence[tuple[str, Evaluation]], problem_ids: Iterable[str]) -> list[Answers]:
    """
    The first completion of some problems in several evaluations.

    Args:
        evaluations (`Sequence[tuple[str, Evaluation]]`):
            Evaluations of one benchmark and what to call them.
        problem_ids (`Iterable[str]`):
            The problems.

    Returns:
        `list[Answers]`: one for each problem.
    """
    folder = evaluations[0][1].folder
    file = None if folder is None else folder / "problems.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file is not None and file.is_file() else []
    prompts = {row["problem_id"]: row["prompt"] for row in map(json.loads, lines)}
    found: dict[str, list[tuple[str, str, str]]] = {}
    references: dict[str, str] = {}
    for name, evaluation in evaluations:
        for sample in evaluation.samples():
            if sample.sample_index == 0:
                verdict = {True: "right", False: "wrong", None: "not graded"}[sample.correct]
                cut = "" if sample.terminated else ", cut off"
                said = f"{verdict}, {sample.num_tokens:,} tokens{cut}"
                found.setdefault(sample.problem_id, []).append((name, said, sample.completion))
                references[sample.problem_id] = sample.reference
    return [
        Answers(f"Problem {it}", prompts.get(it, ""), references[it], found[it]) for it in problem_ids if it in found
    ]


def sampled(run: Run, number: int = 3) -> list[Answers]:
    """
    The first rollouts of the first and of the last logged step, as `log_completions` keeps them. They are of
    different prompts, unless the data are few.

    Args:
        run ([`Run`]):
            The run.
        number (`int`, *optional*, defaults to `3`):
            Rollouts of each of the two.

    Returns:
        `list[Answers]`: none where there are no such files.

    Raises:
        ValueError: If a file cannot be read.
    """
    files = sorted(run.folder.glob("completions/completions_*.parquet"))
    ends = dict.fromkeys([*files[:1], *files[-1:]])
    return [answer for file in ends for answer in _rollouts(run, file, number)]


def _rollouts(run: Run, file: Path, number: int) -> list[Answers]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).slice(0, number).to_pylist()
        return [_rollout(f"{run.name}, rollout {index}", row) for index, row in enumerate(rows, 1)]
    except (OSError, KeyError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{file} holds no completions that can be read: {error!r}.") from error


def _rollout(title: str, row: dict[str, Any]) -> Answers:
    rewards = [
        f"{name} {value:g}"
        for name, value in row.items()
        if name not in ("step", "advantage") and isinstance(value, int | float)
    ]
    said = ", ".join([*rewards, f"advantage {row['advantage']:+.3g}"] if rewards else [])
    return Answers(title, _text(row["prompt"]), "", [(f"step {row['step']}", said, _text(row["completion"]))])


def _text(messages: Any) -> str:
    if isinstance(messages, str):
        return messages
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
