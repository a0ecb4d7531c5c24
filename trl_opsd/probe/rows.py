"""The rows of a probe: drawn, with answers that can be graded."""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from ..eval.scorer import AnswerType, check_reference
from ..help import listed
from .measure import Question


MIN_ROWS = 8
"""Fewest rows of which anything is said."""


def reference_reader(
    columns: Sequence[str], answer_column: str | None, solution_column: str | None, answer_type: AnswerType
) -> Callable[[Mapping[str, Any]], str | None]:
    """
    How to read the right answer of a row.

    Args:
        columns (`Sequence[str]`):
            Columns of the rows.
        answer_column (`str`, *optional*):
            The one with the answer. By default `answer`, or else the one with the solution.
        solution_column (`str`, *optional*):
            The one with the solution.
        answer_type (`str`):
            How answers are graded.

    Returns:
        `Callable[[Mapping[str, Any]], str | None]`: from a row to the answer, `None` where the scorer cannot take it.

    Raises:
        ValueError: If there is no such column.
    """
    asked = [answer_column] if answer_column else ["answer", solution_column]
    known = [its for its in asked if its is not None and its in columns]
    if not known:
        raise ValueError(
            f"The rows have no column `{answer_column or 'answer'}` to grade by; they have {listed(columns)}. Name "
            "the one with the final answer by `--answer_column`."
        )

    def read(row: Mapping[str, Any]) -> str | None:
        value = row[known[0]]
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        text = "" if value is None else str(value).strip()
        try:
            check_reference(text, answer_type)
        except ValueError:
            return None
        return text

    return read


def draw(
    rows: Dataset, number: int, seed: int, reference_of: Callable[[Mapping[str, Any]], str | None]
) -> tuple[list[Question], int]:
    """
    Rows in an order that the seed decides, as many as wanted or as there are.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows.
        number (`int`):
            How many.
        seed (`int`):
            Decides which.
        reference_of (`Callable[[Mapping[str, Any]], str | None]`):
            The right answer of a row, `None` if it has none that can be compared.

    Returns:
        `tuple[list[Question], int]`: the rows, and how many were passed over as they cannot be graded.

    Raises:
        ValueError: If there are too few.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    questions: list[Question] = []
    passed_over = []
    for index in order:
        if len(questions) == number:
            break
        reference = reference_of(rows[index])
        if reference is None:
            passed_over.append(index)
        else:
            questions.append(Question(rows[index], reference))
    if len(questions) < MIN_ROWS:
        example = f" The scorer cannot take the answer of row {passed_over[0]}, for one." if passed_over else ""
        raise ValueError(
            f"Of {len(rows)} rows, {len(questions)} can be graded, and a probe takes at least {MIN_ROWS}.{example} "
            "Give more rows, or say by `--answer_column` and `--answer_type` what the right answer is: the final "
            "answer alone, or a solution with it in \\boxed{} or after ####."
        )
    return questions, len(passed_over)


def summary_of(questions: Sequence[Question]) -> str:
    """What tells some rows from others."""
    text = json.dumps([[its.row["prompt"], its.reference] for its in questions], sort_keys=True, default=str)
    return f"{len(questions)} rows, fingerprint {hashlib.sha256(text.encode()).hexdigest()[:16]}"
