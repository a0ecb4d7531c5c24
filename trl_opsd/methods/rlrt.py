from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

import torch

from ..signal import Advantage, Batch, TokenScores
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class RLRTConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 8,
        "privileged_context": "peers",
        "context_kwargs": {"correct": 1},
        "teacher": "live",
        "divergence_coef": 0.0,
        "policy_loss_coef": 1.0,
        "advantage": "trl_opsd.methods.rlrt.ReversedTeacher",
        "schedules": {"advantage.mix": {"start": 0.5, "end": 0.0, "num_steps": 30}},
        "loss_type": "dapo",
        "epsilon_high": 0.28,
        "temperature": 1.0,
        "max_completion_length": 20480,
        "learning_rate": 1e-6,
    },
):
    r"""
    Train with rewards, and credit what is right although no teacher would say it.

    Defaults of RLRT, from [Rebellious Student: Reversing Teacher Signals for Reasoning Exploration with Self-Distilled
    RLVR](https://huggingface.co/papers/2605.10781), for instruction-tuned models. The teacher is the current policy
    reading another correct rollout of the same prompt. See [`ReversedTeacher`] for the formula. λ = `mix` falls from
    0.5 to 0 over 30 optimizer steps, after which this is GRPO. The paper takes ε = `clip` 1 and a constant λ for base
    models (`schedules: {}`), 0.2 for thinking ones. It needs a reward.

    Chosen here: λ falls in a straight line, and a rollout is not shown to the teacher that scores it; the paper does
    not say. A group with one correct rollout then keeps that rollout's advantage as it is. The wording of the
    teacher's prompt is this library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="RLRT",
        paper="2605.10781",
        title="Rebellious Student: Reversing Teacher Signals for Reasoning Exploration with Self-Distilled RLVR",
        citation=dedent("""\
            @article{kim2026rebellious,
                title        = {{Rebellious Student: Reversing Teacher Signals for Reasoning Exploration with
                                Self-Distilled RLVR}},
                author       = {Jeonghye Kim and Jiwon Jeon and Dongsheng Li and Yuqing Yang},
                year         = 2026,
                eprint       = {arXiv:2605.10781},
            }"""),
        status="seen-paper",
    )


@dataclass(frozen=True)
class ReversedTeacher(Advantage):
    """
    A·[(1 − λ) + λ·clip((p_S / p_T)^sign(A), 1 ± ε)] where the rollout is correct and the teacher has read it, else A.

    Args:
        mix (`float`, *optional*, defaults to `0.5`):
            λ. At 0 this is GRPO.
        clip (`float`, *optional*, defaults to `0.5`):
            ε.
    """

    mix: float = 0.5
    clip: float = 0.5
    reads_own_rollout: ClassVar[bool] = True

    @property
    def needs_scores(self) -> bool:
        return self.mix != 0.0

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        if scores is None:
            return batch.advantages
        ratio, used = (-batch.advantages.sign() * scores.delta).exp(), batch.correct & scores.known
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        batch.log("teacher_ratio_clipped_rate", (clipped != ratio)[used].sum(), used.sum())
        return torch.where(used, batch.advantages * (1 - self.mix + self.mix * clipped), batch.advantages)
