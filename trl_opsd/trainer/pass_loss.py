"""What the loss of some rows, and of a whole micro-batch, consists of, and what it says of tokens."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..objective import FusedDivergence
from ..signal import TokenScores


_SCORES = ("student_log_prob", "teacher_log_prob", "student_entropy", "teacher_entropy", "divergence")


class PassLoss(NamedTuple):
    """
    Loss of some rows.

    Args:
        loss (`torch.Tensor`):
            Scalar.
        divergence ([`FusedDivergence`]):
            Of the tokens that the divergence term counts.
        likelihood (`torch.Tensor` of shape `(n,)`):
            −log p_S of those that the likelihood term counts, without a gradient.
        log_probs (`torch.Tensor` of shape `(n,)`):
            log p_S of all tokens that are read, without a gradient, NaN where it is not finite.
        entropies (`torch.Tensor` of shape `(n,)`):
            Entropy of p_S for the same tokens.
        divergence_factors (`torch.Tensor` of shape `(n,)`):
            Of the tokens of `divergence`, in the loss.
    """

    loss: torch.Tensor
    divergence: FusedDivergence
    likelihood: torch.Tensor
    log_probs: torch.Tensor
    entropies: torch.Tensor
    divergence_factors: torch.Tensor


class MicroBatchLoss(NamedTuple):
    """
    Result of [`SelfDistillationLoss`].

    Args:
        loss (`torch.Tensor`):
            Scalar, divided by the number of micro-batches. It carries the gradient of the last pass; that of the
            others has been accumulated.
        divergence ([`FusedDivergence`]):
            Of all tokens that the divergence term counts, pass by pass. Of none if its coefficient is 0.
        likelihood (`torch.Tensor` of shape `(n,)`):
            −log p_S of those that the likelihood term counts.
        log_probs (`torch.Tensor` of shape `(n,)`):
            log p_S of all tokens that a term counts, NaN where it is not finite.
        entropies (`torch.Tensor` of shape `(n,)`):
            Entropy of p_S for the same tokens.
        passes (`list[dict[str, Any]]`):
            The rows of each pass.
    """

    loss: torch.Tensor
    divergence: FusedDivergence
    likelihood: torch.Tensor
    log_probs: torch.Tensor
    entropies: torch.Tensor
    passes: list[dict[str, Any]]


class Found(NamedTuple):
    """
    What passes have said of tokens, where these stand.

    Args:
        values (`torch.Tensor` of shape `(7, B, T)`):
            Statistics and the factor of each.
        tokens (`torch.Tensor` of shape `(B, T, 2, k)`, int64):
            The most probable tokens of both sides.
        log_probs (`torch.Tensor` of shape `(B, T, 2, k)`):
            Their log-probabilities.
    """

    values: torch.Tensor
    tokens: torch.Tensor
    log_probs: torch.Tensor

    @classmethod
    def nothing(cls, mask: torch.Tensor, num_listed: int) -> "Found":
        """Of tokens in the shape of a mask, with room for `num_listed` probable ones."""
        shape, device = (*mask.shape, 2, num_listed), mask.device
        values = torch.zeros(len(_SCORES) + 2, *mask.shape, device=device)
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        return cls(values, tokens, torch.full(shape, -torch.inf, device=device))

    def add(self, rows: dict[str, Any], found: FusedDivergence, factors: torch.Tensor) -> None:
        """Add what a pass has said, and the factors, of the tokens of the `divergence_mask` of its rows."""
        mask = rows["divergence_mask"].bool()
        given = [*(getattr(found, name) for name in ("finite", *_SCORES)), factors]
        row, column = rows["row"].unsqueeze(1).expand(mask.shape)[mask], mask.nonzero()[:, 1]
        for place, values in zip(self.values, given, strict=True):
            place[row, column] = values.to(place).where(found.finite.bool().to(place.device), 0.0)
        k = found.listed_tokens.size(2)  # no more than the vocabulary has
        self.tokens[row, column, :, :k] = found.listed_tokens.to(self.tokens)
        self.log_probs[row, column, :, :k] = found.listed_log_probs.to(self.log_probs)

    def scores(self, num_listed: int) -> TokenScores:
        """As parts read it, with what is listed if anything is."""
        *values, factors = self.values
        scores = TokenScores(values[0].bool(), *values[1:])
        if not num_listed:
            return scores
        return replace(scores, listed_tokens=self.tokens, listed_log_probs=self.log_probs, teacher_weights=factors)
