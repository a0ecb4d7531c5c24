from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import dedent
from typing import Any, ClassVar

import torch

from ..context import Message, Rollouts, SolutionContext, as_text
from ..signal import Target
from ..trainer.method import Method
from .opsd import OPSDConfig


@dataclass
class PurifiedOPSDConfig(
    OPSDConfig,
    defaults={
        "privileged_context": "trl_opsd.methods.purified_opsd.ReferenceAlone",
        "target": "trl_opsd.methods.purified_opsd.Purified",
        "divergence": "jsd",
        "divergence_clip": None,
        "teacher_chat_template_kwargs": None,
        "chat_template_kwargs": {"enable_thinking": True},
    },
):
    r"""
    Learn from a reference what it says of the question, and not what it says to anybody.

    Defaults of Purified OPSD, from [Purified OPSD: On-Policy Self-Distillation Without Losing How to
    Think](https://huggingface.co/papers/2607.02234). The initial policy reads each rollout three times: after the
    question and the reference c (p_T), after the question alone (p_0), and after the reference alone (p_c). The
    student learns from what the question adds to the reference:

    L = mean over sequences of 1/|ŷ| Σ_t JSD_½(q, p_S), q ∝ p_0 · exp(Δ̃ / β),

    with Δ = log p_T − log p_c, centred and softly clipped, see [`Purified`]. It takes two passes of the teacher more
    than OPSD. No reward takes part.

    Chosen here, as our notes of the paper do not say: Δ is centred by its mean over the vocabulary; p_0 is the
    teacher's and not the student's, after the student's prompt; all three are at the sampling temperature; the
    sampling is OPSD's, but both sides think, as the paper trains models of long reasoning. Deviation: the wording of
    the prompts is this library's; the reference alone stands in the words of the teacher's prompt.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="Purified-OPSD",
        paper="2607.02234",
        title="Purified OPSD: On-Policy Self-Distillation Without Losing How to Think",
        citation=dedent("""\
            @article{shen2026purified,
                title        = {{Purified OPSD: On-Policy Self-Distillation Without Losing How to Think}},
                author       = {Zhanming Shen and Jintao Tong and Shaotian Yan and Chen Shen and Hao Chen and
                                Wentao Ye and Xiaomeng Hu and Rui Miao and Haobo Wang and Junbo Zhao and
                                Gang Chen and Jieping Ye},
                year         = 2026,
                eprint       = {arXiv:2607.02234},
            }"""),
        status="seen-paper",
    )


class ReferenceAlone(SolutionContext):
    """
    The teacher reads the reference solution and, for contrast, the same words without the question: the system's turns
    and the last one.

    Args:
        column (`str`, *optional*, defaults to `"solution"`):
            Dataset column with the reference solution.
        template (`str`, *optional*):
            See [`SolutionContext`].
    """

    def contrast_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[list[Message]]:
        system = [message for message in as_text(row["prompt"]) if message["role"] == "system"]
        [*_, turn] = self.rewritten({**row, "prompt": [{"role": "user", "content": ""}]})
        return [[*system, {**turn, "content": turn["content"].strip()}]]


@dataclass(frozen=True)
class Purified(Target):
    """
    q ∝ p_0 · exp(Δ̃ / β), where Δ̃ = c·tanh((Δ − mean Δ) / c), Δ = log p_T − log p_c, and the mean is over the
    vocabulary. p_0 is the teacher's distribution after the student's prompt, p_c that after the prompt for contrast.

    Args:
        beta (`float`, *optional*, defaults to `1.0`):
            β. The larger, the closer q is to p_0.
        clip (`float`, *optional*, defaults to `10.0`):
            c, in nats.
    """

    beta: float = 1.0
    clip: float = 10.0

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.clip > 0):
            raise ValueError(f"`beta` and `clip` must be positive, got {self.beta} and {self.clip}.")

    def __call__(self, teacher: torch.Tensor, plain: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
        difference = teacher - contrast
        centred = difference - difference.mean(dim=-1, keepdim=True)
        return plain + self.clip * torch.tanh(centred / self.clip) / self.beta
