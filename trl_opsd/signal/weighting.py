"""Weights of tokens in the divergence and the likelihood term."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from .batch import Batch, TokenScores


# Of the loss, those whose tokens are weighted
TERMS = ("divergence", "likelihood")


class TokenWeighting(ABC):
    """
    A factor for each token in `terms` of the loss, both unless it says otherwise.

    Of one that `selects`, what it gives 0 is not counted in the normaliser either: the term is the mean over what is
    kept. One whose terms are all off is not asked. One that `needs_replaced` compares completions that took the place
    of rollouts with others. One that `changes_prompt` says with `reads_context`, of the batch that it was last asked
    about, whether the likelihood is that of the policy reading the teacher's prompt; no other term may count a token
    of it. One with a memory has `state_dict` and `load_state_dict`, as a [`Schedule`] does.
    """

    terms: ClassVar[tuple[str, ...]] = TERMS
    selects: ClassVar[bool] = False
    needs_contrast: ClassVar[bool] = False
    needs_spans: ClassVar[bool] = False
    needs_reward: ClassVar[bool] = False
    needs_replaced: ClassVar[bool] = False
    changes_prompt: ClassVar[bool] = False
    reads_context: bool = False

    @property
    def needs_scores(self) -> bool:
        """Whether it reads the scores of the next batch."""
        return False

    @abstractmethod
    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """
        The factors.

        Args:
            batch ([`Batch`]):
                Rollouts.
            scores ([`TokenScores`], *optional*):
                Scores of their tokens. `None` unless a part of the method `needs_scores`.

        Returns:
            `torch.Tensor` of shape `(B, T)`, or one that broadcasts to it; or one for each of its `terms`, by name.
        """


@dataclass(frozen=True)
class CorrectOnly(TokenWeighting):
    """Keeps rollouts whose reward reaches `success_threshold`, as [correct-only
    self-distillation](https://huggingface.co/papers/2605.06188) and [STaR](https://huggingface.co/papers/2203.14465)
    do."""

    selects: ClassVar[bool] = True
    needs_reward: ClassVar[bool] = True

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        return batch.correct


@dataclass(frozen=True)
class SkipFirst(TokenWeighting):
    """
    Leaves out the first tokens of a completion, where a teacher gives its context away ("Based on the text..."), as
    [SDFT](https://huggingface.co/papers/2601.19897) does.

    Args:
        num_tokens (`int`, *optional*, defaults to `3`):
            Number of tokens. A completion that has no more is left out.
    """

    num_tokens: int = 3
    selects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_tokens < 0:
            raise ValueError(f"`num_tokens` must not be negative, got {self.num_tokens}.")

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        return torch.arange(batch.mask.size(1), device=batch.mask.device) >= self.num_tokens


@dataclass(frozen=True)
class Replaced(TokenWeighting):
    """
    Weighs completions that took the place of rollouts, as [BRTS](https://huggingface.co/papers/2605.09725) does.

    Args:
        weight (`float`):
            Their factor.
    """

    weight: float
    needs_replaced: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight < math.inf:
            raise ValueError(f"`weight` must not be negative or infinite, got {self.weight}.")

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        return torch.where(batch.replaced, self.weight, 1.0)


@dataclass(frozen=True)
class KeepFirst(TokenWeighting):
    """
    Keeps no more than the first tokens of a completion, as [SSOPD](https://huggingface.co/papers/2605.17497) does.

    Args:
        num_tokens (`int`, *optional*, defaults to `1024`):
            Number of tokens.
    """

    num_tokens: int = 1024
    selects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"`num_tokens` must be at least 1, got {self.num_tokens}.")

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        return torch.arange(batch.mask.size(1), device=batch.mask.device) < self.num_tokens


class PolicyWeighting(ABC):
    """A factor for each token that depends on the policy as it is in the loss. It is called for each pass."""

    @abstractmethod
    def __call__(self, log_probs: torch.Tensor, old_log_probs: torch.Tensor) -> torch.Tensor:
        """
        The factors.

        Args:
            log_probs (`torch.Tensor` of shape `(B, T)`):
                Log-probabilities of the tokens under the current student, fp32, in nats.
            old_log_probs (`torch.Tensor` of shape `(B, T)`):
                The same under the policy that sampled them, NaN where they are unknown.

        Returns:
            `torch.Tensor` of shape `(B, T)`.
        """


@dataclass(frozen=True)
class ImportanceClip(PolicyWeighting):
    """
    min(p_S(y_t) / p_old(y_t), most): corrects for a policy that has moved since it sampled, or for an engine whose
    probabilities differ, as [SDPO](https://huggingface.co/papers/2601.20802) does. 1 where neither can be.

    Args:
        most (`float`, *optional*, defaults to `2.0`):
            Upper bound of the ratio.
    """

    most: float = 2.0

    def __post_init__(self) -> None:
        if not self.most > 0:
            raise ValueError(f"`most` must be positive, got {self.most}.")

    def __call__(self, log_probs: torch.Tensor, old_log_probs: torch.Tensor) -> torch.Tensor:
        log_ratio = (log_probs - old_log_probs).nan_to_num(0.0)
        return log_ratio.clamp(-20.0, 20.0).exp().clamp(max=self.most)


class TeacherWeighting(ABC):
    """
    A factor for each token in the divergence that depends on what the teacher would write, and on the policy as it is
    in the loss. It is called for each pass, with whole rollouts, and costs a product with each head.
    """

    @property
    @abstractmethod
    def top_k(self) -> int:
        """Number of the teacher's most probable tokens that it looks at."""

    @abstractmethod
    def __call__(self, mask: torch.Tensor, teacher_entropy: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        """
        The factors.

        Args:
            mask (`torch.Tensor` of shape `(B, T)`, bool):
                The tokens that the divergence counts.
            teacher_entropy (`torch.Tensor` of shape `(B, T)`):
                Entropy of the teacher's distribution over its `top_k` most probable tokens, renormalised, fp32, in
                nats.
            log_probs (`torch.Tensor` of shape `(B, T)`):
                Log-probabilities of the teacher's most probable tokens under the current student, fp32, in nats.

        Returns:
            `torch.Tensor` of shape `(B, T)`.
        """


TOKEN_WEIGHTS = {
    "correct_only": CorrectOnly,
    "skip_first": SkipFirst,
    "keep_first": KeepFirst,
    "replaced": Replaced,
    "importance_clip": ImportanceClip,
}
