"""Advantages of tokens in the policy term."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from .batch import Batch, TokenScores


class Advantage(ABC):
    """
    An advantage for each token, from the one that GRPO gives its rollout.

    It says what it needs: scores, a reward and more than one rollout of a prompt, unless it says otherwise. Where
    `needs_scores` is False, which may depend on its own coefficients, it is called without scores, and costs no pass
    of the teacher. One that `needs_teacher_entropy` is refused with a teacher on a server, which does not tell it. One
    with a memory has `state_dict` and `load_state_dict`, as a [`Schedule`] does. One that `reads_own_rollout` may be
    asked about any rows of a batch, in the loss, where the student's pass gives the scores.
    """

    needs_reward: ClassVar[bool] = True
    needs_group: ClassVar[bool] = True
    needs_teacher_entropy: ClassVar[bool] = False
    reads_own_rollout: ClassVar[bool] = False
    """Whether that of a rollout follows from it and its scores alone, not from others nor from what it remembers."""
    reads_replaced: ClassVar[bool] = True
    """Whether it reads the scores of completions that took the place of rollouts."""

    @property
    def needs_scores(self) -> bool:
        """Whether it reads the scores."""
        return True

    @property
    def needs_contrast(self) -> bool:
        """Whether it reads what the teacher says after the prompts that the context gives for contrast."""
        return False

    @property
    def needs_spans(self) -> bool:
        """Whether it reads the spans that the context marks."""
        return False

    @abstractmethod
    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        """
        The advantages.

        Args:
            batch ([`Batch`]):
                Rollouts, with their advantages by GRPO.
            scores ([`TokenScores`], *optional*):
                Scores of their tokens, `None` if they are not needed.

        Returns:
            `torch.Tensor` of shape `(B, T)` or `(B, 1)`. What it says of tokens outside [`Batch.mask`] is not read.
        """


class GroupAdvantage(Advantage):
    """GRPO's own: that of a rollout, for each of its tokens."""

    @property
    def needs_scores(self) -> bool:
        return False

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        return batch.advantages


ADVANTAGES = {"grpo": GroupAdvantage}
