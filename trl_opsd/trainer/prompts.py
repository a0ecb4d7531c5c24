"""Exchanging the prompts of a batch, and the reward that comes with it."""

from collections.abc import Callable
from typing import Any

import torch

from ..sampling.prompts import PromptSource, RewardingPromptSource
from .asking import Gather
from .rewards import no_reward, total_rewards


class PromptExchange:
    """
    Has a source exchange prompts of batches that are trained on, and adds its reward to theirs.

    Args:
        source ([`~trl_opsd.sampling.prompts.PromptSource`], *optional*):
            The source. Without one, everything stays as it is.
        num_generations (`int`):
            Rollouts of a prompt.
        success_threshold (`float`):
            Least reward of a correct rollout.
        seed (`int`):
            Seed of the run.
        process_index (`int`):
            Number of the process.
        gather (`Callable`):
            From a list of each process to the list of all.
        tokenize (`Callable`):
            From prompts to token ids.
        longest (`int`, *optional*):
            Most tokens of a prompt, if there is a limit.
    """

    def __init__(
        self,
        source: PromptSource | None,
        num_generations: int,
        success_threshold: float,
        seed: int,
        process_index: int,
        gather: Gather,
        tokenize: Callable[[list[Any]], list[list[int]]],
        longest: int | None,
    ):
        self._source = source
        self._num_generations = num_generations
        self._success_threshold = success_threshold
        self._seed = seed
        self._process_index = process_index
        self._gather = gather
        self._tokenize = tokenize
        self._longest = longest

    def rows(self, rows: list[Any], step: int) -> list[Any]:
        """
        The rows of this process, one for each rollout, once some have been exchanged. All processes call this at once.

        Raises:
            ValueError: If the source gives another number of rows.
        """
        if self._source is None:
            return rows
        groups = self._gather(list(rows))[:: self._num_generations]
        made = self._source(groups, self._fits, step, self._seed)
        if len(made) != len(groups):
            raise ValueError(
                f"{type(self._source).__name__} of `prompts` gave {len(made)} rows for {len(groups)}. Give one for "
                "each."
            )
        first = self._process_index * len(rows)
        return [dict(made[(first + index) // self._num_generations]) for index in range(len(rows))]

    def _fits(self, prompt: Any) -> bool:
        return self._longest is None or len(self._tokenize([prompt])[0]) <= self._longest

    def rewards(self, rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """
        Rewards of all processes, of shape `(num_rollouts, num_reward_funcs)`, with that of the source in the last
        column, where [`without_reward`] stands in for it.
        """
        if not isinstance(self._source, RewardingPromptSource):
            return rewards
        totals = total_rewards(rewards[:, :-1], weights[:-1]).view(-1, self._num_generations)
        correct = (totals >= self._success_threshold).float().masked_fill(totals.isnan(), torch.nan)
        added = self._source.reward(correct).masked_fill(totals.isnan(), torch.nan)
        return torch.cat([rewards[:, :-1], added.view(-1, 1)], dim=1)


def without_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Stands in for the reward of a source of prompts, which depends on the others."""
    return [0.0] * len(completions)


def settled(
    source: PromptSource | None, funcs: list[Any], names: list[str], classes: list[Any], weights: torch.Tensor
) -> tuple[list[Any], list[str], list[Any], torch.Tensor]:
    """
    Reward functions, their names, processing classes and weights: without the one that GRPOTrainer was given for want
    of any, and with a stand-in for the reward of a source.
    """
    if funcs[0] is no_reward:
        funcs, names, classes, weights = funcs[1:], names[1:], classes[1:], weights[1:]
    if isinstance(source, RewardingPromptSource):
        funcs, names, classes = [*funcs, without_reward], [*names, source.reward_name], [*classes, None]
        weights = torch.cat([weights, torch.ones(1)])
    return funcs, names, classes, weights
