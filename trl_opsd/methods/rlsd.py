from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

import torch

from ..signal import Advantage, Batch, TokenScores
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class RLSDConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 8,
        "privileged_context": "solution",
        "teacher": "periodic",
        "teacher_update_steps": 10,
        "divergence_coef": 0.0,
        "policy_loss_coef": 1.0,
        "advantage": "trl_opsd.methods.rlsd.TeacherWeighted",
        "schedules": {"advantage.mix": {"start": 0.5, "end": 0.0, "num_steps": 50}},
        "loss_type": "dapo",
        "epsilon_high": 0.28,
        "temperature": 1.0,
        "max_completion_length": 4096,
        "learning_rate": 1e-6,
    },
):
    r"""
    Train with rewards, and let a teacher say which tokens earned them.

    Defaults of RLSD, from [Self-Distilled RLVR](https://huggingface.co/papers/2604.03128): GRPO, whose advantage A of
    a rollout is made larger where the teacher agrees with its direction, and smaller where it does not. See
    [`TeacherWeighted`] for the formula. λ = `mix` falls from 0.5 to 0 in a straight line over 50 optimizer steps,
    after which this is GRPO, without a pass of the teacher. The teacher is a copy of the policy, refreshed every 10
    steps. It needs a reward.

    Two released codes differ from the paper: one takes the student's probabilities from before the update, as this
    library does, the other the current ones and λ = 1. Deviation: the wording of the teacher's prompt is this
    library's. The paper trains a vision-language model, of which there is a recipe beside one of text.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="RLSD",
        paper="2604.03128",
        title="Self-Distilled RLVR",
        citation=dedent("""\
            @article{yang2026selfdistilled,
                title        = {{Self-Distilled RLVR}},
                author       = {Chenxu Yang and Chuanyu Qin and Qingyi Si and Minghui Chen and Naibin Gu and
                                Dingyu Yao and Zheng Lin and Weiping Wang and Jiaqi Wang and Nan Duan},
                year         = 2026,
                eprint       = {arXiv:2604.03128},
            }"""),
        status="seen-paper, seen-code",
    )


@dataclass(frozen=True)
class TeacherWeighted(Advantage):
    """
    A·[(1 − λ) + λ·clip((p_T / p_S)^sign(A), 1 ± ε)] where the teacher has read the rollout, else A.

    Args:
        mix (`float`, *optional*, defaults to `0.5`):
            λ. At 0 this is GRPO.
        clip (`float`, *optional*, defaults to `0.2`):
            ε.
    """

    mix: float = 0.5
    clip: float = 0.2
    reads_own_rollout: ClassVar[bool] = True

    @property
    def needs_scores(self) -> bool:
        return self.mix != 0.0

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        if scores is None:
            return batch.advantages
        ratio = (batch.advantages.sign() * scores.delta).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        batch.log("teacher_ratio_clipped_rate", (clipped != ratio)[scores.known].sum(), scores.known.sum())
        return torch.where(scores.known, batch.advantages * (1 - self.mix + self.mix * clipped), batch.advantages)
