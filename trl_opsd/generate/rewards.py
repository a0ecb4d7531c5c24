"""Grading completions by the reward functions of a training run."""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import TrainerState

from .base import Attempt


class Rewards:
    """
    Grades completions. Reward functions are called as [`~trl.GRPOTrainer`] calls them, also asynchronous ones; what
    they log is dropped.

    Args:
        functions (`Sequence[Callable]`):
            Reward functions. The reward of a completion is the sum of those that are not `None`.
        rows (`Sequence[Mapping[str, Any]]`):
            Rows that completions belong to.
        success_threshold (`float`):
            Reward from which on a completion is correct.
        batch_size (`int`):
            Completions graded by one call.

    Raises:
        ValueError: If a function cannot be called with the columns of the rows.
    """

    def __init__(
        self,
        functions: Sequence[Callable[..., Any]],
        rows: Sequence[Mapping[str, Any]],
        success_threshold: float,
        batch_size: int,
    ):
        self._functions, self._rows = functions, rows
        self._success_threshold, self._batch_size = success_threshold, batch_size
        for function in functions:
            try:
                inspect.signature(function).bind(**self._arguments([Attempt(0, "", [], 0, False)]))
            except TypeError as error:
                raise ValueError(
                    f"The reward function `{_name(function)}` of `reward_funcs` cannot be called with the columns "
                    f"{', '.join(f'`{column}`' for column in rows[0])}: {error}. Rename a column with "
                    "`column_mapping`."
                ) from error
            except ValueError:  # some built-in ones have no signature
                continue

    def __call__(self, attempts: Sequence[Attempt]) -> list[Attempt]:
        """
        The same completions with their rewards; without reward functions, as they are.

        Args:
            attempts (`Sequence[Attempt]`):
                Completions.

        Raises:
            ValueError: If a function does not give a finite number, or `None`, for each.
        """
        if not self._functions:
            return list(attempts)
        graded = []
        for start in range(0, len(attempts), self._batch_size):
            batch = attempts[start : start + self._batch_size]
            columns = asyncio.run(self._call(batch))
            for attempt, *given in zip(batch, *columns, strict=True):
                applied = [reward for reward in given if reward is not None]
                total = sum(applied) if applied else None
                correct = None if total is None else total >= self._success_threshold
                graded.append(replace(attempt, reward=total, correct=correct))
        return graded

    async def _call(self, batch: Sequence[Attempt]) -> list[list[float | None]]:
        given = [function(**self._arguments(batch)) for function in self._functions]
        waited = iter(await asyncio.gather(*(value for value in given if inspect.isawaitable(value))))
        values = [next(waited) if inspect.isawaitable(value) else value for value in given]
        pairs = zip(self._functions, values, strict=True)
        return [_checked(_name(function), rewards, len(batch)) for function, rewards in pairs]

    def _arguments(self, batch: Sequence[Attempt]) -> dict[str, Any]:
        rows = [self._rows[attempt.row] for attempt in batch]
        columns = {
            name: [row[name] for row in rows] for name in rows[0] if name not in ("completion", "completion_ids")
        }
        return {
            **{name: values for name, values in columns.items() if name != "prompt"},
            "prompts": columns["prompt"],
            "completions": [attempt.completion for attempt in batch],
            "completion_ids": [attempt.token_ids for attempt in batch],
            "trainer_state": TrainerState(),
            "log_extra": lambda *args: None,
            "log_metric": lambda *args: None,
        }


def _checked(name: str, values: Any, number: int) -> list[float | None]:
    values = list(values)
    if len(values) != number:
        raise ValueError(f"The reward function `{name}` gave {len(values)} rewards for {number} completions.")
    rewards = [None if value is None or math.isnan(value) else float(value) for value in values]
    if any(reward is not None and math.isinf(reward) for reward in rewards):
        raise ValueError(f"The reward function `{name}` gave an infinite reward. Give a finite number, or `None`.")
    return rewards


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
