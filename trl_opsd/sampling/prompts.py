"""Which prompts are sampled from: those of the dataset, or what takes the place of some of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


Row = Mapping[str, Any]


class PromptSource(ABC):
    """
    Exchanges rows of a batch that is trained on before its prompts are sampled from. A row that it takes out comes
    again in the next epoch.

    Write a subclass in any importable module and name it in `prompts`. It decides alike on every process. One with a
    memory has `remember`, `state_dict` and `load_state_dict`, as a [`~trl_opsd.context.Memory`] does; `rates(rows,
    rollouts)` says what to log of a batch, as that of a [`~trl_opsd.context.PrivilegedContext`] does.
    """

    @abstractmethod
    def __call__(self, rows: Sequence[Row], fits: Callable[[Any], bool], step: int, seed: int) -> list[Row]:
        """
        Exchange some rows.

        Args:
            rows (`Sequence[Mapping[str, Any]]`):
                Dataset rows of all processes, one for each group of rollouts.
            fits (`Callable[[Any], bool]`):
                Whether a prompt, text or messages as those of the rows are, leaves room for a completion.
            step (`int`):
                Optimizer steps done.
            seed (`int`):
                Seed of the run.

        Returns:
            `list[Mapping[str, Any]]`: as many rows, all with the same columns.
        """

    def check_run(self, scale_rewards: str) -> None:
        """See how GRPO scales rewards, before the model is loaded."""


class RewardingPromptSource(PromptSource):
    """One that adds a reward to those of the reward functions."""

    reward_name: str
    """Name of that reward."""

    @abstractmethod
    def reward(self, correct: torch.Tensor) -> torch.Tensor:
        """
        A reward besides those of the reward functions, of weight 1.

        Args:
            correct (`torch.Tensor` of shape `(number of groups, number of rollouts of a prompt)`):
                Whether the others reach `success_threshold`, 1 or 0, NaN where none applied.

        Returns:
            `torch.Tensor` of the same shape.
        """
