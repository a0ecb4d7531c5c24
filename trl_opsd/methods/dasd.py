from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

import torch

from ..signal import Advantage, Batch, TokenScores
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class DASDConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 8,
        "privileged_context": "solution",
        "teacher": "live",
        "divergence_coef": 0.0,
        "policy_loss_coef": 1.0,
        "advantage": "trl_opsd.methods.dasd.DirectionByEntropy",
        "loss_type": "dapo",
        "temperature": 1.0,
        "max_completion_length": 8192,
        "learning_rate": 3e-6,
        "lr_scheduler_type": "cosine",
    },
):
    r"""
    Train with rewards, towards a teacher where the student is sure, else away.

    Defaults of DASD, from [Tailoring Teaching to Aptitude: Direction-Adaptive Self-Distillation for LLM
    Reasoning](https://huggingface.co/papers/2605.22263). The teacher is the current policy reading the reference
    solution. See [`DirectionByEntropy`] for the advantage. It needs a reward.

    Chosen here: β = `strength` 0.1 and ε = `epsilon` 1e-3, which the paper prints nowhere, and the mean over all
    tokens (`loss_type`). The wording of the teacher's prompt is this library's. Nothing else bounds δ̄: where student
    and teacher agree on most tokens of a rollout, its median is small, and the others weigh much.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="DASD",
        paper="2605.22263",
        title="Tailoring Teaching to Aptitude: Direction-Adaptive Self-Distillation for LLM Reasoning",
        citation=dedent("""\
            @article{zhang2026tailoring,
                title        = {{Tailoring Teaching to Aptitude: Direction-Adaptive Self-Distillation for LLM
                                Reasoning}},
                author       = {Hongbin Zhang and Chaozheng Wang and Kehai Chen and Youcheng Pan and Yang Xiang and
                                Jinpeng Wang and Min Zhang},
                year         = 2026,
                eprint       = {arXiv:2605.22263},
            }"""),
        status="seen-paper",
    )


@dataclass(frozen=True)
class DirectionByEntropy(Advantage):
    """
    A + β·ω_t·δ̄_t with ω_t = tanh((τ − H_t) / (σ̂ + ε))·sigmoid(|δ̄_t| − 1) and δ̄_t = δ_t / (median_t |δ_t| + ε), where
    the teacher has read the rollout, else A. H_t is the student's entropy, τ its quantile and σ̂ its mean absolute
    deviation, all within the rollout.

    Args:
        strength (`float`, *optional*, defaults to `0.1`):
            β. At 0 this is GRPO.
        quantile (`float`, *optional*, defaults to `0.2`):
            ρ. Tokens with less entropy than this quantile are pulled towards the teacher.
        epsilon (`float`, *optional*, defaults to `1e-3`):
            ε, in nats. Where the two differ by less, as by rounding, little is made of it.
    """

    strength: float = 0.1
    quantile: float = 0.2
    epsilon: float = 1e-3
    reads_own_rollout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.quantile <= 1.0:
            raise ValueError(f"`quantile` must be in [0, 1], got {self.quantile}.")

    @property
    def needs_scores(self) -> bool:
        return self.strength != 0.0

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        if scores is None:
            return batch.advantages
        direction, scaled = torch.zeros(2, *scores.delta.shape, device=scores.delta.device)
        for row, known in enumerate(scores.known):
            if known.any():
                direction[row, known] = self._direction(scores.student_entropy[row, known])
                scaled[row, known] = self._scaled(scores.delta[row, known])
        batch.log("direction/pulled_token_rate", (direction > 0).sum(), scores.known.sum())
        return batch.advantages + self.strength * direction * torch.sigmoid(scaled.abs() - 1) * scaled

    def _direction(self, entropy: torch.Tensor) -> torch.Tensor:
        deviation = (entropy - entropy.mean()).abs().mean()
        return torch.tanh((entropy.quantile(self.quantile) - entropy) / (deviation + self.epsilon))

    def _scaled(self, delta: torch.Tensor) -> torch.Tensor:
        return delta / (delta.abs().quantile(0.5) + self.epsilon)  # between the middle two of an even number
