from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

import torch

from ..signal import Batch, TokenScores, TokenWeighting
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class RESDConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 1,
        "privileged_context": "playbook",
        "teacher": "ema",
        "teacher_update_rate": 1e-4,
        "divergence": "reverse_kl",
        "divergence_support": "student_top_k",
        "divergence_top_k": 100,
        "divergence_tail": "bucket",
        "divergence_ratio_low": 0.2,
        "divergence_ratio_high": 5.0,
        "token_weights": {"trl_opsd.methods.resd.BySuccess": {}},
        "loss_type": "luspo",
        "temperature": 1.0,
        "top_p": 0.95,
        "max_completion_length": 8192,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
    },
):
    r"""
    Learn from failures, by reflections on them and a playbook of lessons.

    Defaults of RESD, from [Learning with Rare Success but Rich Feedback via Reflection-Enhanced
    Self-Distillation](https://huggingface.co/papers/2605.12741), with one rollout ŷ of a prompt. A moving average of
    the policy reads a playbook of lessons, an earlier solution of the problem by the policy and, of a failed rollout,
    the policy's reflection on it and the feedback, of a correct one the rollout itself ([`PlaybookContext`]):

    L = 1/B Σ_i w_i Σ_t Σ_v p_S(v)·(log p_S(v) − log p_T(v)), with p_T(v) kept between 0.2 and 5 times p_S(v),

    over the student's 100 most probable tokens and one entry for all others, and w_i as in [`BySuccess`]. It needs a
    reward.

    Paper and released code differ in the gradient of what is out of bounds: in the code the bounded teacher is data,
    as it is here; the paper's entry is there a multiple of p_S(v), which is `divergence_bounded="ratio"`. The values
    are the same. They differ in what is on as well. The paper's largest ratio is 5 and its weights are on for two of
    its tasks (`token_weights={}` turns them off); the released script has no largest ratio
    (`divergence_ratio_high=None`) and weights. The paper's Algorithm 1 copies the weights to the teacher
    (`teacher="periodic"`), and its text averages.

    Chosen here: lessons, and the counts of what helps and harms, are lines at the end of a reflection; when one is
    stale; how long rollouts are. Deviations: no buffer of prompts by priority; several updates from a batch of prompts
    (`num_iterations`) reuse its rollouts, where the paper samples new ones; the wording of all prompts is this
    library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="RESD",
        paper="2605.12741",
        title="Learning with Rare Success but Rich Feedback via Reflection-Enhanced Self-Distillation",
        citation=dedent("""\
            @article{zhang2026learning,
                title        = {{Learning with Rare Success but Rich Feedback via Reflection-Enhanced
                                Self-Distillation}},
                author       = {Yuwei Zhang and Sha Li and Changlong Yu and Qin Lu and Shuowei Jin and
                                Chengyu Dong and Haoran Liu and Ilgee Hong and Xintong Li and Zhenyu Shi and
                                Bing Yin and Jingbo Shang},
                year         = 2026,
                eprint       = {arXiv:2605.12741},
            }"""),
        status="seen-paper, seen-code",
    )


@dataclass(frozen=True)
class BySuccess(TokenWeighting):
    """
    (1 − s)^α for correct rollouts and s^β for others, divided by their mean, with s the share of correct ones among
    the B rollouts of the batch, kept between 1/B and 1 − 1/B: what is rare counts more.

    Args:
        success_power (`float`, *optional*, defaults to `1.0`):
            α.
        failure_power (`float`, *optional*, defaults to `1.0`):
            β.
    """

    success_power: float = 1.0
    failure_power: float = 1.0
    needs_reward: ClassVar[bool] = True

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        correct = batch.gather(batch.correct.float())
        if len(correct) == 1:
            return torch.ones_like(batch.rewards)
        rate = correct.mean().clamp(1 / len(correct), 1 - 1 / len(correct))
        weights = torch.where(batch.correct, (1 - rate) ** self.success_power, rate**self.failure_power)
        return weights / batch.gather(weights).mean()
