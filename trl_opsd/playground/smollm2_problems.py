"""The problems of the demo on SmolLM2: grade-school mathematics with worked solutions that have been checked."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ..files import whole_folder


_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
# Two numbers, one operation and the result, not preceded by another operation that would have to be done first.
_STEP = re.compile(rf"(?<![\d.,%*/x×+-])(?<![*/x×+-] )({_NUMBER}) ?([-+*/x×]) ?({_NUMBER}) ?= ?[$£€]?({_NUMBER})")
_OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "x": lambda a, b: a * b,
    "×": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else math.nan,
}


def prepare_data(folder: Path, console: Console, num_train: int = 512, num_test: int = 48, seed: int = 0) -> None:
    """
    Writes `train.jsonl` and `test.jsonl`, unless they are there already.

    Args:
        folder (`Path`):
            Where they go.
        console ([`~rich.console.Console`]):
            Console to write to.
        num_train (`int`, *optional*, defaults to `512`):
            Number of problems to train on.
        num_test (`int`, *optional*, defaults to `48`):
            Number of held-out problems.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the problems.
    """
    if folder.is_dir():
        console.print(f"The data in {folder} are there already and are used again.")
        return
    splits = make_problems(num_train, num_test, seed)
    with whole_folder(folder) as unfinished:
        for name, rows in splits.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (unfinished / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    console.print(f"Data: gsm_symbolic, {num_train} problems to train on, {num_test} held out, in {folder}")


def make_problems(num_train: int, num_test: int, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """
    Makes grade-school problems with worked solutions: `gsm_symbolic` of reasoning-gym.

    A `gsm_symbolic` problem is a template with other names and numbers each time. Every fifth template is held out, so
    that no held-out problem resembles one that was trained on.

    Args:
        num_train (`int`):
            Number of problems to train on.
        num_test (`int`):
            Number of held-out problems.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the problems.

    Returns:
        `dict[str, list[dict]]`:
            `"train"` and `"test"` rows with the columns `prompt` (messages), `solution`, `answer` and `template` (its
            number).
    """
    import reasoning_gym

    wanted = {"train": num_train, "test": num_test}
    splits: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    seen = set()
    # More than enough: about two problems in five pass, and one in five of those is held out.
    problems = reasoning_gym.create_dataset("gsm_symbolic", size=5 * num_train + 20 * num_test + 200, seed=seed)
    held_out = set(sorted(set(problems.task_indices))[::5])
    for problem, template in zip(problems, problems.task_indices, strict=True):
        name = "test" if template in held_out else "train"
        solution = worked_solution(problem, problems)
        question = problem["question"]
        if len(splits[name]) == wanted[name] or solution is None or question in seen:
            continue
        seen.add(question)
        splits[name].append(
            {
                "prompt": [{"role": "user", "content": question}],
                "solution": solution,
                "answer": problem["answer"],
                "template": template,
            }
        )
    return splits


def worked_solution(problem: Mapping[str, Any], scorer: Any, max_length: int = 260) -> str | None:
    """
    The worked solution of a problem, or `None` if it is flawed or too long for a short run.

    Some are flawed: a step was rounded (17 · 0.5 = 8), or a number was not (0.6666666666666666).

    Args:
        problem (`Mapping[str, Any]`):
            Entry of the dataset.
        scorer:
            The dataset, whose `score_answer(answer, entry)` is 1.0 for a right answer.
        max_length (`int`, *optional*, defaults to `260`):
            Longest solution, in characters.

    Returns:
        `str`, *optional*: the solution.
    """
    steps, mark, final = problem["metadata"]["answer_cot"].rpartition("####")
    steps, final = steps.strip(), final.strip().replace(",", "")
    if not mark or scorer.score_answer(final, problem) != 1.0:
        return None
    if len(steps) > max_length or re.search(r"\d\.\d{4}", steps + problem["question"]):
        return None
    numbers = [float(number.replace(",", "")) for number in re.findall(_NUMBER, steps)]
    if float(final) not in numbers:
        return None
    for left, operation, right, result in _STEP.findall(steps):
        a, b, c = (float(number.replace(",", "")) for number in (left, right, result))
        if not math.isclose(_OPERATIONS[operation](a, b), c, abs_tol=0.006):
            return None
    return f"{steps}\nThe answer is {final}."


def is_right(text: str, answer: str) -> bool:
    """Whether the last number of a text is the answer."""
    numbers = re.findall(_NUMBER, text)
    return bool(numbers) and float(numbers[-1].replace(",", "")) == float(answer)
