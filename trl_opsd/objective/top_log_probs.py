"""A teacher that is known by the log-probabilities of a few tokens, as an inference server reports them."""

import math
from typing import NamedTuple

import torch

from .objective import Objective
from .readings import Readings


SERVED_SUPPORTS = ("teacher_top_k", "sampled_token")


class TopLogProbs(NamedTuple):
    """
    Log-probabilities of the k most probable tokens and of the sampled one. All are fp32 or wider, at temperature 1.

    Args:
        top_tokens (`torch.Tensor` of shape `(N, k)`):
            The k most probable tokens, int64.
        top_log_probs (`torch.Tensor` of shape `(N, k)`):
            Theirs, in nats.
        sampled_tokens (`torch.Tensor` of shape `(N,)`):
            The sampled tokens, among the top k or not, int64.
        sampled_log_probs (`torch.Tensor` of shape `(N,)`):
            Theirs, in nats.
    """

    top_tokens: torch.Tensor
    top_log_probs: torch.Tensor
    sampled_tokens: torch.Tensor
    sampled_log_probs: torch.Tensor

    def check(self, objective: Objective) -> None:
        """
        Refuse an objective that these log-probabilities do not determine.

        Raises:
            ValueError: If more of the teacher's distribution is needed, or its logits at another temperature.
        """
        if objective.support not in SERVED_SUPPORTS:
            raise ValueError(
                f"`support='{objective.support}'` needs the teacher's probabilities of tokens that are not among its "
                f"own top k. Choose one of {list(SERVED_SUPPORTS)}."
            )
        if objective.top_k != self.top_tokens.size(1):
            raise ValueError(f"`top_k={objective.top_k}`, but {self.top_tokens.size(1)} tokens are known.")
        if objective.temperature != 1.0:
            raise ValueError(
                f"`temperature={objective.temperature}` needs the teacher's whole distribution: log-probabilities of "
                "a few tokens cannot be brought to another temperature."
            )

    def to(self, device: torch.device) -> "TopLogProbs":
        """The same on a device."""
        return TopLogProbs(*(tensor.to(device) for tensor in self))

    def rows(self, rows: slice) -> "TopLogProbs":
        """The same for some of the rows."""
        return TopLogProbs(*(tensor[rows] for tensor in self))

    def write_log_probs(self, out: torch.Tensor) -> None:
        """
        Write a distribution with these probabilities; what is left is spread evenly over all other tokens.

        None of them thereby becomes more probable than the k-th, so the top k, their probabilities, their sum and the
        sampled token's are those of the teacher. Its entropy is an upper bound of the teacher's.

        Args:
            out (`torch.Tensor` of shape `(N, V)`):
                Where it is written.
        """
        is_repeated = (self.top_tokens == self.sampled_tokens.unsqueeze(1)).any(dim=1)
        mass = self.top_log_probs.exp().sum(dim=1) + torch.where(is_repeated, 0.0, self.sampled_log_probs.exp())
        num_others = out.size(1) - self.top_tokens.size(1) - (~is_repeated).long()
        # Less than the rounding of the sum cannot be told from nothing, and must not push others into the top k
        rest = (1 - mass).clamp(min=torch.finfo(mass.dtype).eps) / num_others.clamp(min=1)
        lowest = self.top_log_probs.amin(dim=1)
        below = torch.nextafter(lowest, torch.full_like(lowest, -torch.inf))
        out.copy_(rest.log().minimum(below).unsqueeze(1).expand_as(out))
        out.scatter_(1, self.top_tokens, self.top_log_probs.to(out.dtype))
        out.scatter_(1, self.sampled_tokens.unsqueeze(1), self.sampled_log_probs.unsqueeze(1).to(out.dtype))


def finite_rows(states: torch.Tensor | Readings | TopLogProbs) -> torch.Tensor:
    """Whether all that is known of a row is finite, of shape `(N,)`, from hidden states of shape `(N, H)` or else."""
    if isinstance(states, Readings):
        states = torch.cat(states.states, dim=1)
    if isinstance(states, TopLogProbs):
        states = torch.cat([states.top_log_probs, states.sampled_log_probs.unsqueeze(1)], dim=1)
    # The norm of a NaN is no number, and compares as false
    return torch.linalg.vector_norm(states, math.inf, dim=-1) < math.inf
