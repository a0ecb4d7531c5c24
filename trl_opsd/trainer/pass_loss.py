"""What the loss of some rows, and of a whole micro-batch, consists of."""

from typing import Any, NamedTuple

import torch

from ..objective import FusedDivergence


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
