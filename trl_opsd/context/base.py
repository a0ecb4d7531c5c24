"""The hook every kind of privileged context implements."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


Message = dict[str, Any]


@dataclass(frozen=True)
class Rollouts:
    """
    The rollouts of one prompt, and which of them the teacher is about to score.

    Args:
        texts (`list[str]`):
            Decoded completions of the group, in order.
        rewards (`list[float | None]`):
            Sum of the weighted rewards of each, `None` without reward functions or where none applied.
        index (`int`):
            Position of the rollout being scored.
    """

    texts: list[str]
    rewards: list[float | None]
    index: int


class PrivilegedContext(Protocol):
    """
    What the teacher reads beyond the student's prompt.

    Implement it in any importable class and name that class in `privileged_context`:

    ```python
    class Hint:
        columns = ("hint",)

        def teacher_messages(self, row, rollouts):
            *history, question = row["prompt"]
            return [*history, {**question, "content": f"{question['content']}\\n\\nHint: {row['hint']}"}]
    ```
    """

    columns: tuple[str, ...]
    """Dataset columns it reads. Each must be present and non-empty in every row, which is checked before training."""

    def teacher_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message] | None:
        """
        Messages the teacher reads instead of the row's prompt.

        Args:
            row (`Mapping[str, Any]`):
                Dataset row. `row["prompt"]` is a list of messages, whose content is a string; a plain-text prompt
                arrives as one user message.
            rollouts ([`Rollouts`], *optional*):
                The rollouts of this prompt. `None` before they exist: when prompts are checked and shown before
                training, and when the teacher itself samples (`seq_kd`).

        Returns:
            `list[Message]`, *optional*: the teacher's prompt, ending before the assistant's turn. `None` if there is
            no context for this rollout, which is then left out of the loss and counted.
        """
        ...


def as_text(messages: list[Message]) -> list[Message]:
    """Messages whose content is a list of text parts, as some data formats have it, with the text itself instead."""
    return [
        {**message, "content": "".join(part["text"] for part in message["content"])}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def last_user_turn(messages: list[Message]) -> int:
    """Index of the last user message."""
    return max(index for index, message in enumerate(messages) if message["role"] == "user")
