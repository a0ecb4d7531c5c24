from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from .base import Message, without_thinking
from .rollouts import Rollout, Rollouts
from .template import TextContext


_SIBLING = """{prompt}

For your eyes only, this attempt at the problem is known to be right.

<<< attempt >>>
{attempt}
<<< end of attempt >>>

Understand why it is right, then solve the problem yourself in your own words, without mentioning the attempt. Give \
the final answer in the form the problem asks for."""


class SiblingContext(TextContext, ABC):
    """
    The teacher reads one other rollout of the same prompt, the one that a subclass chooses. A rollout for which it
    chooses none has no context.

    Args:
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and `{attempt}`, besides any dataset
            columns.
        strip_thinking (`bool`, *optional*, defaults to `False`):
            Whether to leave out the attempt's reasoning up to `</think>`.

    Raises:
        ValueError: If the template is malformed.
    """

    reads_rollouts = True
    needs_rewards = True
    """Whether the choice depends on which rollouts are correct."""

    def __init__(self, template: str | None = None, strip_thinking: bool = False):
        super().__init__(_SIBLING if template is None else template, "attempt")
        self.strip_thinking = strip_thinking

    def check_run(self, num_generations: int, has_rewards: bool, has_feedback: bool) -> None:
        """Refuse a run in which nothing could be chosen."""
        name = type(self).__name__
        if num_generations < 2:
            raise ValueError(
                f"{name} needs `num_generations` of at least 2, got {num_generations}: a rollout that is alone has no "
                "others. Raise it, or choose another `privileged_context`."
            )
        if self.needs_rewards and not has_rewards:
            raise ValueError(
                f"{name} needs rewards, which tell correct rollouts from wrong ones. Pass `reward_funcs`, or an "
                "environment that has `get_reward`."
            )

    @abstractmethod
    def chosen(self, rollouts: Rollouts) -> Rollout | None:
        """The rollout that the teacher of `rollouts.own` reads."""

    def teacher_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message] | None:
        sibling = None if rollouts is None else self.chosen(rollouts)
        text = "" if sibling is None else self.shown(sibling)
        return self.rewritten(row, attempt=text) if text else None

    def shown(self, rollout: Rollout) -> str:
        """What the teacher reads of a rollout."""
        return without_thinking(rollout.text) if self.strip_thinking else rollout.text.strip()
