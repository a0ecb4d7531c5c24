from collections.abc import Mapping
from typing import Any

from .base import Message
from .rollouts import Rollouts
from .template import TextContext


_FEEDBACK = """{prompt}

For your eyes only, this is what came back on an earlier attempt at this problem:

<<< feedback >>>
{feedback}
<<< end of feedback >>>

Take it into account and solve the problem from the beginning, without mentioning the earlier attempt."""

_WITH_ATTEMPT = """{prompt}

For your eyes only, this is an earlier attempt at this problem, and what came back on it:

<<< earlier attempt >>>
{attempt}
<<< feedback >>>
{feedback}
<<< end of feedback >>>

Take both into account and solve the problem from the beginning, without mentioning the earlier attempt."""


class FeedbackContext(TextContext):
    """
    The teacher reads what reward functions, the environment or the dataset say about the rollout it scores. A rollout
    without feedback has no context.

    Args:
        attempt (`bool`, *optional*, defaults to `False`):
            Whether the teacher reads the rollout itself too.
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}`, `{feedback}` and, with `attempt`,
            `{attempt}`, besides any dataset columns.
    """

    reads_rollouts = True

    def __init__(self, attempt: bool = False, template: str | None = None):
        default = _WITH_ATTEMPT if attempt else _FEEDBACK
        super().__init__(default if template is None else template, "feedback", *(["attempt"] if attempt else []))

    def check_run(self, num_generations: int, has_rewards: bool, has_feedback: bool) -> None:
        """Refuse a run in which nothing gives feedback."""
        if not has_feedback:
            raise ValueError(
                "The feedback context needs something that gives feedback: `reward_funcs` that call "
                "`log_extra('feedback', [...])`, an environment with an attribute `feedback`, a `rollout_func` that "
                "returns `feedback`, or a dataset column `feedback`."
            )

    def teacher_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message] | None:
        if rollouts is None or rollouts.own.feedback is None:
            return None
        return self.rewritten(row, feedback=rollouts.own.feedback, attempt=rollouts.own.text)
