import math
from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

import torch

from ..signal import TeacherWeighting
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


_TWIN = """{prompt}

For your eyes only, this is the same request in English.

<<< request in English >>>
{english}
<<< end of request in English >>>

First judge by the English wording whether it is safe to help. If it is not, decline politely and say why. If it is, \
help as well as you can. Either way, answer in the language that the request was first written in."""


@dataclass
class MSDConfig(
    SelfDistillationConfig,
    defaults={
        "privileged_context": "template",
        "context_kwargs": {"template": _TWIN},
        "teacher": "initial",
        "divergence": "reverse_kl",
        "token_weights": {"trl_opsd.methods.msd.DualPerspective": {"top_k": 32}},
        "temperature": 1.0,
        "max_completion_length": 1024,
        "learning_rate": 5e-6,
    },
):
    r"""
    Be as safe in every language as in English.

    Defaults of MSD with DPSW, on-policy, from [Multilingual Safety Alignment via
    Self-Distillation](https://huggingface.co/papers/2605.02971). The initial policy reads a request x in any language
    together with its English twin c, the column `english`, and is asked to judge that one:

    L = mean over sequences of 1/|ŷ| Σ_t w̃_t·KL(p_S‖p_T),

    with p_S = p(· | x, ŷ₍<t₎) and p_T = p(· | x, c, ŷ₍<t₎). See [`DualPerspective`] for the weights w̃; without them
    (`token_weights={}`) it is plain MSD. The paper's off-policy variant samples from the teacher:
    `completions="teacher"`. It needs no reward and no responses.

    Chosen here: the learning rate, from the range that the paper searches, the temperature and the length of
    completions; the weights carry no gradient, which the paper implies. The wording of the teacher's prompt is this
    library's. The paper's second edition has not been read.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="MSD",
        paper="2605.02971",
        title="Multilingual Safety Alignment via Self-Distillation",
        citation=dedent("""\
            @article{qin2026multilingual,
                title        = {{Multilingual Safety Alignment via Self-Distillation}},
                author       = {Ruiyang Qin and Qingzhuo Wang and Dongrui Liu and Qiang Li and Zhihua Wei and
                                Wen Shen},
                year         = 2026,
                eprint       = {arXiv:2605.02971},
            }"""),
        status="seen-paper",
    )


@dataclass(frozen=True)
class DualPerspective(TeacherWeighting):
    """
    w̃_t = |ŷ|·w_t / Σ w with w_t = (1 − H_t / log K)·(1 − p_S(y*_t)): a token weighs much where the teacher is sure of
    y*_t, its most probable token, and the student would not write it. H_t is the teacher's entropy over its K most
    probable tokens, renormalised. A rollout whose weights are all 0 teaches nothing.

    Args:
        top_k (`int`, *optional*, defaults to `32`):
            K.
    """

    top_k: int = 32

    def __post_init__(self) -> None:
        if self.top_k < 2:
            raise ValueError(f"`top_k` must be at least 2, got {self.top_k}: one token has no entropy.")

    def __call__(self, mask: torch.Tensor, teacher_entropy: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        certainty = (1 - teacher_entropy / math.log(self.top_k)).clamp(0.0, 1.0)  # rounding may leave the interval
        weights = certainty * -torch.expm1(log_probs)
        known = mask & weights.isfinite()
        weights = weights.where(known, 0.0)
        total = weights.sum(dim=1, keepdim=True)
        return torch.where(total > 0, weights * known.sum(dim=1, keepdim=True) / total, 0.0)
