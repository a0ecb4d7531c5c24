"""The rollouts of a prompt, as contexts read them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rollout:
    """
    One completion of a prompt, and what became of it.

    Args:
        text (`str`):
            The completion, decoded without special tokens.
        token_ids (`list[int]`):
            Its tokens; none if it is empty.
        reward (`float`, *optional*):
            Sum of its weighted rewards. `None` without reward functions, or where none applied.
        correct (`bool`, *optional*):
            Whether the reward reaches `success_threshold`. `None` where there is no reward.
        feedback (`str`, *optional*):
            What the reward functions, the environment and the dataset say about it.
        truncated (`bool`):
            Whether it was cut off before its end.
        index (`int`):
            Position among the rollouts of its prompt.
        said (`Any`, *optional*):
            What was sampled, or said, about it for the context. Known to a [`Memory`] alone.
        replaced (`bool`, *optional*, defaults to `False`):
            Whether the completion is another than the student's own rollout of its prompt.
    """

    text: str
    token_ids: list[int]
    reward: float | None
    correct: bool | None
    feedback: str | None
    truncated: bool
    index: int
    said: Any = None
    replaced: bool = False


@dataclass(frozen=True)
class Rollouts:
    """
    The rollouts of one prompt, and which of them the teacher is about to score.

    Args:
        all (`list[Rollout]`):
            The group, in order.
        index (`int`):
            Position of the rollout being scored.
    """

    all: list[Rollout]
    index: int

    @property
    def own(self) -> Rollout:
        """The rollout being scored."""
        return self.all[self.index]

    @property
    def texts(self) -> list[str]:
        """Text of each."""
        return [rollout.text for rollout in self.all]

    @property
    def rewards(self) -> list[float | None]:
        """Reward of each."""
        return [rollout.reward for rollout in self.all]

    def others(self, correct: bool | None = None) -> list[Rollout]:
        """
        The rollouts besides the one being scored, in order. One with the same text is another rollout.

        Args:
            correct (`bool`, *optional*):
                Only those that are known to be correct, or wrong. `None` gives all.
        """
        others = [rollout for rollout in self.all if rollout.index != self.index]
        return others if correct is None else [rollout for rollout in others if rollout.correct is correct]
