from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

import torch

from ..signal import Advantage, Batch, TokenScores
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class VOPDConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 1,
        "privileged_context": "solution",
        "teacher": "initial",
        "divergence": "reverse_kl",
        "divergence_support": "student_top_k",
        "divergence_top_k": 20,
        "divergence_tail": "renormalize",
        "divergence_coef": 0.0,
        "policy_loss_coef": 1.0,
        "advantage": "trl_opsd.methods.vopd.ValueBaseline",
        "loss_type": "dapo",
        "temperature": 1.0,
        "max_completion_length": 2048,
        "learning_rate": 1e-5,
    },
):
    r"""
    Distil a teacher by policy gradient, with the reverse KL as its baseline.

    Defaults of vOPD, from [KL for a KL: On-Policy Distillation with Control Variate
    Baseline](https://huggingface.co/papers/2605.07865). See [`ValueBaseline`] for the advantage; its expected gradient
    is that of −KL(p_S‖p_T), whatever the baseline's support. No reward takes part. The baseline sums over the 20 most
    probable tokens of the student, as the paper's experiments do; `divergence_support="full"` sums over all.

    Deviations: the paper distils an external teacher that reads the student's prompt (`teacher="external"`,
    `privileged_context="none"`; self-distillation is its future work), and here the initial policy reads the solution.
    Chosen here: the mean over all tokens (`loss_type`). The released code offers a lower bound of the advantage, which
    is left out.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="vOPD",
        paper="2605.07865",
        title="KL for a KL: On-Policy Distillation with Control Variate Baseline",
        citation=dedent("""\
            @article{oh2026kl,
                title        = {{KL for a KL: On-Policy Distillation with Control Variate Baseline}},
                author       = {Minjae Oh and Sangjun Song and Gyubin Choi and Yunho Choi and Yohan Jo},
                year         = 2026,
                eprint       = {arXiv:2605.07865},
            }"""),
        status="seen-paper, seen-code",
    )


class ValueBaseline(Advantage):
    """
    δ_t + KL_t, with δ_t = log p_T(y_t) − log p_S(y_t) of the whole vocabulary, and KL_t the divergence that the
    configuration chooses. 0 for tokens that the teacher has not read.
    """

    needs_reward: ClassVar[bool] = False
    reads_own_rollout: ClassVar[bool] = True

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        assert scores is not None
        return scores.delta + scores.divergence
