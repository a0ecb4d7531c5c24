"""The policy term: GRPOTrainer's own loss, from log-probabilities that are data or by a forward pass of its own."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .config import SelfDistillationConfig
from .metrics import Metrics, add_policy


# From some rows, and a function that gives log-probabilities of their completions and entropies, both of shape (B, T):
# a loss, and its derivative with respect to each log-probability, with the sign turned.
PolicyTerm = Callable[
    [dict[str, Any], Callable[[], tuple[torch.Tensor, torch.Tensor]]], tuple[torch.Tensor, torch.Tensor]
]


class GRPOLoss:
    """
    Whatever [`~trl.GRPOConfig`] asks for, by GRPOTrainer's code, with what it logs as sums and counts.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration.
        compute_loss (`Callable`):
            GRPOTrainer's, of a model and a micro-batch.
        logged (`dict[str, Any]`):
            Where it logs, by `"train"` and `"eval"`.
        statistics (`Mapping[str, Metrics]`):
            Where the means and extremes of that go.
        coefficients (`Mapping[str, float]`):
            Of the terms of the loss, as they are in this step.
        has_policy_term (`bool`):
            Whether the coefficient of the policy term is ever positive.
        needs_own_pass (`bool`):
            Whether something else than log-probabilities of tokens takes part.
    """

    def __init__(
        self,
        args: SelfDistillationConfig,
        compute_loss: Callable[[Any, dict[str, Any]], torch.Tensor],
        logged: dict[str, Any],
        statistics: Mapping[str, Metrics],
        coefficients: Mapping[str, float],
        has_policy_term: bool,
        needs_own_pass: bool,
    ):
        self._args = args
        self._compute_loss = compute_loss
        self._logged = logged
        self._statistics = statistics
        self._coefficients = coefficients
        self.takes_part = args.beta != 0.0 or has_policy_term or needs_own_pass
        """Whether the loss has it."""
        # What follows from the log-probabilities at the divergence's temperature comes from its forward pass
        is_same_temperature = args.distillation_temperature == args.temperature
        self.shares_pass = self.takes_part and not needs_own_pass and is_same_temperature
        """Whether the student's pass through the divergence is enough."""
        self.given: tuple[torch.Tensor, torch.Tensor, None] | None = None
        """Log-probabilities and entropies that it is computed from meanwhile."""

    def __call__(self, model: Any, inputs: dict[str, Any], mode: str) -> torch.Tensor:
        """
        The loss of a micro-batch.

        Args:
            model (`nn.Module`):
                Policy, wrapped as it is trained.
            inputs (`dict[str, Any]`):
                Micro-batch.
            mode (`str`):
                `"train"` or `"eval"`.
        """
        kept, self._logged[mode] = self._logged[mode], defaultdict(list)
        advantages = inputs["advantages"] * self._coefficients["policy_loss_coef"]
        try:
            loss = self._compute_loss(model, {**inputs, "advantages": advantages})
        finally:
            logged, self._logged[mode] = self._logged[mode], kept
        tokens = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        by_sequence = self._args.importance_sampling_level == "sequence" and advantages.dim() == 1
        for name, values in add_policy(self._statistics[mode], logged, tokens, by_sequence).items():
            kept[name] += values
        return loss

    def term(self, model: Any, mode: str) -> PolicyTerm | None:
        """The same as a term of the student's pass, `None` if that is not enough or there is none."""
        return partial(self._value_and_slopes, model, mode) if self.shares_pass else None

    def _value_and_slopes(
        self,
        model: Any,
        mode: str,
        rows: dict[str, Any],
        read: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._reads_log_probs(rows):
            log_probs, entropies = read()
        else:  # the ratio to themselves is 1 wherever they are
            shape = rows["completion_mask"].shape
            log_probs, entropies = rows["completion_mask"].new_zeros(2, *shape, dtype=torch.float32)
        with torch.enable_grad():
            log_probs = log_probs.detach().requires_grad_()
            self.given = log_probs, entropies, None
            try:
                loss = self(model, rows, mode)
            finally:
                self.given = None
            (slopes,) = torch.autograd.grad(loss, log_probs)
        return loss.detach(), -slopes

    def _reads_log_probs(self, inputs: dict[str, Any]) -> bool:
        """Whether the loss or its gradient depends on the values of the student's log-probabilities."""
        return (
            inputs.get("old_per_token_logps") is not None
            or self._args.beta != 0.0
            or self._args.loss_type in ("cispo", "vespo")
            or self._args.off_policy_mask_threshold is not None
            or self._args.top_entropy_quantile < 1.0
        )


def scaled_term(policy: PolicyTerm, factor: torch.Tensor) -> PolicyTerm:
    """A term times a factor."""

    def scaled(rows, log_probs):
        value, slopes = policy(rows, log_probs)
        return value * factor, slopes * factor

    return scaled
