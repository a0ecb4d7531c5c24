"""The interface every kind of teacher implements."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..objective import Head, Readings, TopLogProbs


# Runs a module over some rows: the hidden states that predict their tokens, after one prompt or several, and its head
Read = Callable[[nn.Module, dict[str, Any]], tuple[torch.Tensor | Readings, Head]]


class TokenTargets(NamedTuple):
    """
    What one teacher says of n among N tokens.

    Args:
        states (`torch.Tensor` of shape `(n, H_t)`, [`Readings`] or [`TopLogProbs`]):
            Hidden states, after one prompt or several, or log-probabilities.
        head ([`Head`], *optional*):
            What is to be applied to the states.
        tokens (`torch.Tensor` of shape `(N,)`, bool, *optional*):
            Which tokens they are. `None` for all.
    """

    states: torch.Tensor | Readings | TopLogProbs
    head: Head | None
    tokens: torch.Tensor | None = None


class Teacher(ABC):
    """
    Whose weights read the privileged prompt.

    A teacher gives the targets for a batch and, if it keeps weights of its own, says when they change and puts them
    into checkpoints.

    Attributes:
        description (`str`):
            Whose weights they are, for people.
        knows_entropy (`bool`):
            Whether it gives whole distributions, so that their entropy is known.
        context_length (`int`, *optional*):
            Tokens it takes for a prompt and its completion, if that is not the policy's limit.
        fingerprint (`str`, *optional*):
            Tells it from another teacher, for one that a resumed run neither makes from the policy nor finds in the
            checkpoint.
        members (`Mapping[str, Teacher]`):
            By their names, the teachers of which each row has one. A single teacher has none.
    """

    description: str
    knows_entropy: bool = True
    context_length: int | None = None
    fingerprint: str | None = None
    members: Mapping[str, "Teacher"] = {}

    @abstractmethod
    def weights(self, policy: nn.Module) -> AbstractContextManager[nn.Module | None]:
        """
        Context manager that yields a module holding the teacher's weights, or `None` if they are not here.

        Args:
            policy (`nn.Module`):
                The policy as the trainer calls it, wrapped for DDP, FSDP2 or DeepSpeed. Teachers that share its
                weights yield it.
        """

    def annotate(
        self,
        prompts: Sequence[list[int] | None],
        batch: dict[str, torch.Tensor],
        rows: Sequence[Mapping[str, Any]],
    ) -> dict[str, torch.Tensor]:
        """
        What has to be asked of the teacher as soon as rollouts are there. Called on every process, each with its own.

        Args:
            prompts (`Sequence[list[int] | None]`):
                Token ids of the B teacher prompts. `None` for a row without a context.
            batch (`dict[str, torch.Tensor]`):
                The rollouts, with `completion_ids` and `completion_mask` of shape `(B, T)`.
            rows (`Sequence[Mapping[str, Any]]`):
                The dataset row of each.

        Returns:
            `dict[str, torch.Tensor]`: columns for the batch, of B rows, which [`targets`] finds in its rows.
        """
        return {}

    def targets(
        self, policy: nn.Module, rows: dict[str, Any], selected: torch.Tensor, read: Read
    ) -> list[TokenTargets]:
        """
        What the teacher says of some tokens, without a gradient.

        Args:
            policy (`nn.Module`):
                See [`weights`].
            rows (`dict[str, Any]`):
                Rows of a batch, with what [`annotate`] added. Their `divergence_mask` is `selected`.
            selected (`torch.Tensor` of shape `(B, T)`, bool):
                The completion tokens.
            read (`Callable`):
                From a module and rows to the hidden states that predict the tokens of their `divergence_mask`, and
                the module's head.

        Returns:
            `list[TokenTargets]`: of each of these tokens one.
        """
        with torch.no_grad(), self.weights(policy) as module:
            assert module is not None
            return [TokenTargets(*read(module, rows))]

    def shared_tokens(self, num_tokens: int) -> int | None:
        """The first tokens of the vocabulary that it shares with a policy of `num_tokens`, if these are not all."""
        return None

    def on_step_end(self, step: int) -> None:
        """Called on every process after optimizer step number `step`."""

    def save(self, directory: Path, is_main_process: bool) -> None:
        """Write what a resumed run needs into `directory`. Called on every process."""

    def load(self, directory: Path) -> None:
        """Restore what [`save`] wrote. Called on every process."""
