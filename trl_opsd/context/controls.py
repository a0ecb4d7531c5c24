"""Contexts that should help less than the solution does, or not at all: what a gain is compared with."""

import hashlib
import json
import math
import random
import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

from datasets import Dataset

from .base import Message, as_text
from .rollouts import Rollouts
from .solution import SolutionContext
from .template import TextContext


class NoContext:
    """The teacher reads the student's own prompt and nothing else."""

    columns: tuple[str, ...] = ()
    reads_rollouts = False

    def teacher_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message] | None:
        return as_text(row["prompt"])


class _AlteredSolutionContext(TextContext):
    """Shows something else where [`SolutionContext`] shows the solution, in the same words."""

    def __init__(self, column: str, template: str | None):
        super().__init__(SolutionContext(column, template).template)
        self.column = column


class OtherSolutionContext(_AlteredSolutionContext):
    """
    The teacher reads the solution of another problem of the training set, always the same for a problem, and never one
    that equals its own.

    Args:
        column (`str`, *optional*, defaults to `"solution"`):
            Dataset column with the reference solution.
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and `{<column>}`.
        seed (`int`, *optional*, defaults to `0`):
            Another one pairs the problems in another way.
    """

    def __init__(self, column: str = "solution", template: str | None = None, seed: int = 0):
        super().__init__(column, template)
        self.seed = seed
        self._rows: Any = ()

    def read_dataset(self, dataset: Any) -> None:
        """Take the solutions from a training set, all of which must be at hand."""
        if not isinstance(dataset, Dataset):
            raise ValueError(
                "The other_solution context needs a `train_dataset` that is no stream, to find another problem in."
            )
        self._rows = dataset

    def teacher_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message] | None:
        return self.rewritten({**row, self.column: self.other(row)[self.column]})

    def other(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """
        The row whose solution is shown.

        Args:
            row (`Mapping[str, Any]`):
                Dataset row.

        Raises:
            ValueError: If there is no other one.
        """
        own = _written(row["prompt"])
        start = _number(self.seed, own) % max(len(self._rows), 1)
        for index in chain(range(start, len(self._rows)), range(start)):
            other = self._rows[index]
            if other[self.column] != row[self.column] and _written(other["prompt"]) != own:
                return other
        raise ValueError(
            f"No other problem has a `{self.column}` that differs from {row[self.column]!r:.80}. The other_solution "
            "context needs at least two different ones."
        )


class PartialSolutionContext(_AlteredSolutionContext):
    """
    The teacher reads the first part of the reference solution. A solution of which nothing would be left has no
    context.

    Args:
        column (`str`, *optional*, defaults to `"solution"`):
            Dataset column with the reference solution.
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and `{<column>}`.
        share (`float`, *optional*, defaults to `0.5`):
            Share of its words to show, rounded down.

    Raises:
        ValueError: If `share` is not between 0 and 1.
    """

    def __init__(self, column: str = "solution", template: str | None = None, share: float = 0.5):
        super().__init__(column, template)
        if not 0.0 < share < 1.0:
            raise ValueError(f"`share` of the partial_solution context must be above 0 and below 1, got {share}.")
        self.share = share

    def teacher_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message] | None:
        words = re.findall(r"\s*\S+", str(row[self.column]))
        part = "".join(words[: math.floor(self.share * len(words))])
        return self.rewritten({**row, self.column: part}) if part else None


class ShuffledSolutionContext(_AlteredSolutionContext):
    """
    The teacher reads the reference solution with its lines in another order, or its sentences if it has one line,
    always the same for a solution. One that has no two different ones has no context.

    Args:
        column (`str`, *optional*, defaults to `"solution"`):
            Dataset column with the reference solution.
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and `{<column>}`.
        seed (`int`, *optional*, defaults to `0`):
            Another one shuffles in another way.
    """

    def __init__(self, column: str = "solution", template: str | None = None, seed: int = 0):
        super().__init__(column, template)
        self.seed = seed

    def teacher_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message] | None:
        text = str(row[self.column])
        between = "\n"
        pieces = [line for line in text.splitlines() if line.strip()]
        if len(pieces) < 2:
            between = " "
            pieces = re.split(r"(?<=[.!?])\s+", text.strip())
        if len(set(pieces)) < 2:
            return None
        shuffled = list(pieces)
        numbers = random.Random(_number(self.seed, text))
        while shuffled == pieces:
            numbers.shuffle(shuffled)
        return self.rewritten({**row, self.column: between.join(shuffled)})


def _written(prompt: Any) -> str:
    """A prompt as one text, whether it is plain or messages."""
    if isinstance(prompt, str):
        return prompt
    # As the trainer hands plain prompts to contexts
    messages = as_text(prompt)
    if len(messages) == 1 and messages[0]["role"] == "user":
        return str(messages[0]["content"])
    return json.dumps([[message["role"], message["content"]] for message in messages], default=str)


def _number(seed: int, text: str) -> int:
    """A number that a seed and a text decide, the same in every process."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{text}".encode()).digest()[:8])
