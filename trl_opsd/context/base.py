"""The hook every kind of privileged context implements."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .rollouts import Rollout, Rollouts


if TYPE_CHECKING:
    from .spans import Marks

Message = dict[str, Any]


class PrivilegedContext(Protocol):
    """
    What the teacher reads beyond the student's prompt.

    Implement it in any importable class and name that class in `privileged_context`:

    ```python
    class Hint:
        columns = ("hint",)
        reads_rollouts = False

        def teacher_messages(self, row, rollouts):
            *history, question = row["prompt"]
            return [*history, {**question, "content": f"{question['content']}\\n\\nHint: {row['hint']}"}]
    ```

    A context that samples implements [`SampledContext`] as well, one that somebody else answers for
    [`AnsweredContext`], and one that marks parts of rollouts [`MarkingContext`]. In a step in which nobody reads the
    context, nothing is sampled and nobody answers. One with a [`Memory`] has `state_dict` and `load_state_dict` as
    well, for checkpoints. More methods are called where a class has them:

    - before the model is loaded, `check_run(num_generations, has_rewards, has_feedback)`, which raises a `ValueError`
      if the context could never be given, and `read_dataset(dataset)` with the training set (`None` if there is none);
    - `rates(rows, rollouts)`, which is handed the rows of a batch and the [`Rollouts`] of each, and says what to log
      of them: numerator and denominator by name, always the same names in the same order;
    - where a part of the method contrasts (`needs_contrast`), `contrast_messages(row, rollouts)`, which returns a list
      of prompts, each as from `teacher_messages`, after each of which the teacher reads the rollout once more.
    """

    columns: tuple[str, ...]
    """Dataset columns it reads. Each must be present and non-empty in every row, which is checked before training."""

    reads_rollouts: bool
    """Whether it reads the rollouts. If not, it gets none, and none are gathered from the other processes. A class
    without this attribute reads them."""

    def teacher_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message] | None:
        """
        Messages the teacher reads instead of the row's prompt.

        Args:
            row (`Mapping[str, Any]`):
                Dataset row. `row["prompt"]` is a list of messages, whose content is a string; a plain-text prompt
                arrives as one user message.
            rollouts ([`Rollouts`], *optional*):
                The rollouts of this prompt. `None` before they exist: when prompts are checked and shown before
                training, and when completions are sampled from it (`completions`).

        Returns:
            `list[Message]`, *optional*: the teacher's prompt, ending before the assistant's turn. `None` if there is
            no context for this rollout, which is then left out of the loss and counted.
        """
        ...


@runtime_checkable
class Memory(Protocol):
    """What a part keeps of all that has been trained on, alike on every process."""

    def remember(self, groups: Sequence[tuple[Mapping[str, Any], list[Rollout]]]) -> None:
        """
        See a batch after the teacher's prompts for it have been made.

        Args:
            groups (`Sequence[tuple[Mapping[str, Any], list[Rollout]]]`):
                Dataset row of each prompt, on all processes, and its rollouts.
        """
        ...


@runtime_checkable
class SampledContext(Protocol):
    """
    A context part of which the current policy writes. All prompts of a batch are sampled from in one call; rows of a
    process with the same prompt share what was sampled.
    """

    sampling: dict[str, Any]
    """How it is sampled: `temperature`, `top_p`, `top_k` and `max_new_tokens`."""

    def sample_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message] | None:
        """
        Messages the policy answers.

        Returns:
            `list[Message]`, *optional*: `None` if nothing is to be sampled for this rollout.
        """
        ...

    def teacher_messages(
        self, row: Mapping[str, Any], rollouts: Rollouts | None, sampled: str | None = None
    ) -> list[Message] | None:
        """As in [`PrivilegedContext`]. `sampled` is the policy's answer, `None` where there is none (yet)."""
        ...


@runtime_checkable
class AnsweredContext(Protocol):
    """
    A context part of which somebody else says: a function, a dataset column, a model on a server. What is said of a
    rollout is `sampled` in `teacher_messages`, and may be anything.
    """

    def answers(self, rows: Sequence[tuple[Mapping[str, Any], Rollouts] | None]) -> list[Any]:
        """
        What is said of each rollout of this process.

        Args:
            rows (`Sequence[tuple[Mapping[str, Any], Rollouts] | None]`):
                Dataset row, and the rollouts of its prompt. `None` for a rollout that is empty.
        """
        ...

    def teacher_messages(
        self, row: Mapping[str, Any], rollouts: Rollouts | None, sampled: Any = None
    ) -> list[Message] | None:
        """As in [`PrivilegedContext`]. `sampled` is what was said, `None` where nothing was (yet)."""
        ...


@runtime_checkable
class MarkingContext(Protocol):
    """A context that marks parts of a rollout, which parts of the method find in [`Batch.spans`]."""

    kinds: tuple[str, ...]
    """Kinds of spans."""
    most_of_it: float
    """Largest share of a rollout's tokens that are marked."""

    def marks(self, row: Mapping[str, Any], rollouts: Rollouts, said: Any) -> "Marks":
        """
        What is marked of a rollout.

        Args:
            row (`Mapping[str, Any]`):
                Dataset row.
            rollouts ([`Rollouts`]):
                The rollouts of the prompt.
            said (`Any`):
                What was sampled or answered for it, `None` without.
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


def without_thinking(text: str) -> str:
    """Text of a completion after its reasoning; nothing if it never left its think block."""
    _, closed, after = text.rpartition("</think>")
    return after.strip() if closed else text.partition("<think>")[0].strip()
