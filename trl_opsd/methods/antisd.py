import math
from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

import torch
from torch.nn.functional import softplus

from ..signal import Advantage, Batch, TokenScores
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class AntiSDConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 8,
        "privileged_context": "peers",
        "context_kwargs": {"correct": 1, "fallback": "solution"},
        "teacher": "live",
        "divergence_coef": 0.0,
        "policy_loss_coef": 1.0,
        "advantage": "trl_opsd.methods.antisd.AwayFromTeacher",
        "schedules": {
            "advantage.strength": {"kind": "hysteresis", "value": 0.5, "low": 0.93, "high": 1.0, "warmup_steps": 5}
        },
        "loss_type": "dapo",
        "temperature": 1.0,
        "max_completion_length": 32768,
        "learning_rate": 1e-6,
    },
):
    r"""
    Train with rewards, and away from a teacher, as long as it is uncertain.

    Defaults of AntiSD, from [Anti-Self-Distillation for Reasoning RL via Pointwise Mutual
    Information](https://huggingface.co/papers/2605.11609), as the paper has it. The teacher is the current policy
    reading another correct rollout of the same prompt, or the reference solution where there is none. See
    [`AwayFromTeacher`] for the advantage, whose expected gradient ascends the Jensen-Shannon divergence. Its strength
    λ is 0 for 5 steps, then 0.5 while the teacher's entropy is at least 0.93 of what it was in them, and 0 from then
    on until it is back. It needs a reward, and a `solution` column.

    The released code is another algorithm (it standardises within each sequence, gates by perplexity, and has other
    strengths), and not this one. Deviations: the gate reads the mean of the teacher's entropy, where the paper takes
    the median; the teacher is not told whether the rollout that it scores is correct; the wording of its prompt is
    this library's. Chosen here: the mean over all tokens (`loss_type`), and that the gate is open after the warm-up.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="AntiSD",
        paper="2605.11609",
        title="Anti-Self-Distillation for Reasoning RL via Pointwise Mutual Information",
        citation=dedent("""\
            @article{shen2026antiselfdistillation,
                title        = {{Anti-Self-Distillation for Reasoning RL via Pointwise Mutual Information}},
                author       = {Guobin Shen and Xiang Cheng and Chenxiao Zhao and Lei Huang and Jindong Li and
                                Dongcheng Zhao and Xing Yu},
                year         = 2026,
                eprint       = {arXiv:2605.11609},
            }"""),
        status="seen-paper, seen-code",
    )


@dataclass(frozen=True)
class AwayFromTeacher(Advantage):
    """
    A − λ·½(softplus(δ_t) − log 2) where the teacher has read the rollout, else A. The bonus of a token is at most
    λ·½ log 2, its penalty grows with δ_t.

    Args:
        strength (`float`, *optional*, defaults to `0.5`):
            λ. At 0 this is GRPO.
    """

    strength: float = 0.5
    reads_own_rollout: ClassVar[bool] = True

    @property
    def needs_scores(self) -> bool:
        return self.strength != 0.0

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        if scores is None:
            return batch.advantages
        shaped = batch.advantages - self.strength * 0.5 * (softplus(scores.delta) - math.log(2.0))
        return torch.where(scores.known, shaped, batch.advantages)
