"""A target that is made of what one teacher says after three prompts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .head import Finish
from .products import project


# From the log-probabilities after the teacher's, the student's and the contrasting prompt, each of shape (N, V), to
# logits of the target
Combine = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Readings:
    """
    Hidden states of the same N tokens after three prompts, and what is made of the three distributions.

    Args:
        states (`tuple[torch.Tensor, ...]`, each of shape `(N, H)`):
            After the teacher's prompt, after the student's, and after the one that is there for contrast.
        combine (`Callable`):
            From their log-probabilities to the target, see [`Combine`].
    """

    states: tuple[torch.Tensor, ...]
    combine: Combine

    def to(self, device: torch.device) -> "Readings":
        """The same on a device."""
        return Readings(tuple(states.to(device) for states in self.states), self.combine)

    def __getitem__(self, rows: slice | torch.Tensor) -> "Readings":
        """The same for some of the tokens."""
        return Readings(tuple(states[rows] for states in self.states), self.combine)

    def write_logits(
        self, out: torch.Tensor, weight: torch.Tensor, finish: Finish, dtype: torch.dtype, temperature: float
    ) -> None:
        """
        Write the target's logits, which give its distribution once they are divided by the temperature.

        Args:
            out (`torch.Tensor` of shape `(N, V)`):
                Where they are written, fp32 or wider.
            weight (`torch.Tensor` of shape `(V, H)`):
                The teacher's head.
            finish ([`Finish`]):
                The rest of it.
            dtype (`torch.dtype`):
                Of the operands of the products.
            temperature (`float`):
                The logits of all three are divided by it before they are combined.
        """
        log_probs = []
        for states in self.states:
            project(states.to(dtype), weight, out, dtype)
            log_probs.append((finish.logits(out) / temperature).log_softmax(dim=-1))
        out.copy_(self.combine(*log_probs) * temperature)
