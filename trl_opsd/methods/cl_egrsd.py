from dataclasses import dataclass
from typing import ClassVar

from ..trainer.method import Method
from .egrsd import EGRSDConfig


@dataclass
class CLEGRSDConfig(EGRSDConfig, defaults={"advantage_kwargs": {"gate": 0.3, "lookahead": 3}}):
    r"""
    Train with rewards on single rollouts, and trust a teacher that is soon certain again.

    Defaults of CL-EGRSD, from [Respecting Self-Uncertainty in On-Policy Self-Distillation for Efficient LLM
    Reasoning](https://huggingface.co/papers/2605.13255), for 4B models. This is EGRSD whose gate reads the least
    entropy of a token and the W = `lookahead` after it: what is uncertain for a moment keeps its weight. The paper
    takes γ = `gate` 1.0 and W = 5 for 8B models. See [`EntropyGated`] for the formula. It needs a reward.

    The paper's eq. 8 and its Algorithm 1 disagree on what the entropies are divided by; this is eq. 8, and
    `largest_of: replaced` in `advantage_kwargs` is Algorithm 1. What else is chosen here is as in [`EGRSDConfig`].

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="CL-EGRSD",
        paper="2605.13255",
        title=EGRSDConfig.method.title,
        citation=EGRSDConfig.method.citation,
        status="seen-paper",
    )
