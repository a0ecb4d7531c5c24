from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

from ..trainer.method import Method
from .sdpo import SDPOConfig


@dataclass
class MOPDConfig(
    SDPOConfig,
    defaults={
        "context_kwargs": {"correct": 2, "wrong": 1, "feedback": True},
        "max_completion_length": 4096,
    },
):
    r"""
    Learn from what other attempts got right and wrong, token by token.

    Defaults of MOPD, from [Multi-Rollout On-Policy Distillation via Peer Successes and
    Failures](https://huggingface.co/papers/2605.12652). This is SDPO whose teacher reads up to two correct rollouts of
    the same prompt, a wrong one, and the feedback on the one that it scores, which is never among them:

    L = mean over tokens of min(p_S(ŷ_t) / p_old(ŷ_t), 2) · JSD_½(p_T, p_S), p_T = p(· | x, ŷ⁺, ŷ⁺⁺, ŷ⁻, ŷ₍<t₎).

    What there is none of is left out; as in the released code's best runs, a wrong rollout is shown by itself too
    (`wrong_alone: false` in `context_kwargs` masks such rollouts). On maths the paper takes
    `divergence="reverse_kl"`. It needs a reward.

    Deviations: the wrong rollout is the first of the group, where the code draws one; the mean is that of the whole
    optimizer step; the wording of the prompt is this library's. Another method of this name distils several teachers.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="MOPD",
        paper="2605.12652",
        title="Multi-Rollout On-Policy Distillation via Peer Successes and Failures",
        citation=dedent("""\
            @article{yu2026multirollout,
                title        = {{Multi-Rollout On-Policy Distillation via Peer Successes and Failures}},
                author       = {Weichen Yu and Xiaomin Li and Yizhou Zhao and Xiaoze Liu and Ruowang Zhang and
                                Haixin Wang and Yinyi Luo and Chen Henry Wu and Gaurav Mittal and
                                Matt Fredrikson and Yu Hu},
                year         = 2026,
                eprint       = {arXiv:2605.12652},
            }"""),
        status="seen-paper, seen-code",
    )
