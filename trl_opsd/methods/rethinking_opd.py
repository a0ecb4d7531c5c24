from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class RethinkingOPDConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 4,
        "privileged_context": "solution",
        "teacher": "initial",
        "divergence": "reverse_kl",
        "divergence_support": "student_top_k",
        "divergence_top_k": 16,
        "divergence_tail": "renormalize",
        "loss_type": "dapo",
        "temperature": 1.0,
        "max_completion_length": 7168,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
    },
):
    r"""
    Distil a teacher on the few tokens that the student would write.

    Defaults of the on-policy distillation of [Rethinking On-Policy Distillation of Large Language Models:
    Phenomenology, Mechanism, and Recipe](https://huggingface.co/papers/2604.13016), as the paper has it:

    L = mean over tokens of KL(p̄_S‖p̄_T),

    where both distributions are restricted to the student's 16 most probable tokens, and renormalised. The other
    supports of the paper are `divergence_support="teacher_top_k"`, `"union_top_k"`, `"intersection_top_k"` and
    `"sampled_token"`; the share of tokens in common, which the paper watches, is logged as `top_k_overlap`. No reward
    takes part.

    The released code optimises something else, a policy gradient: see [`RethinkingOPDCodeConfig`].

    Deviations: the paper distils an external teacher that reads the student's prompt (`teacher="external"`,
    `privileged_context="none"`), and here the initial policy reads the solution; where the two have at most one token
    in common, an intersection teaches nothing. The wording of the teacher's prompt is this library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="Rethinking-OPD",
        paper="2604.13016",
        title="Rethinking On-Policy Distillation of Large Language Models: Phenomenology, Mechanism, and Recipe",
        citation=dedent("""\
            @article{li2026rethinking,
                title        = {{Rethinking On-Policy Distillation of Large Language Models: Phenomenology, Mechanism,
                                and Recipe}},
                author       = {Yaxuan Li and Yuxin Zuo and Bingxiang He and Jinqian Zhang and Chaojun Xiao and
                                Cheng Qian and Tianyu Yu and Huan-ang Gao and Wenkai Yang and Zhiyuan Liu and
                                Ning Ding},
                year         = 2026,
                eprint       = {arXiv:2604.13016},
            }"""),
        status="notes, seen-code",
    )
