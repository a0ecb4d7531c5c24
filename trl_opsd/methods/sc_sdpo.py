from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

import torch

from ..signal import Batch, TokenScores, TokenWeighting
from ..trainer.method import Method
from .sdpo import SDPOConfig


@dataclass
class SCSDPOConfig(
    SDPOConfig,
    defaults={
        "token_weights": {"importance_clip": {"most": 2.0}, "trl_opsd.methods.sc_sdpo.SweetSpot": {"exponent": 0.5}},
        "max_completion_length": 2048,
    },
):
    r"""
    Learn from own successes, most where about half of the attempts succeed.

    Defaults of SC-SDPO, from [Restoring the Sweet Spot: Pass-Rate Weighted Self-Distillation for LLM
    Reasoning](https://huggingface.co/papers/2605.27765). This is SDPO, each of whose groups has a weight by the share
    p̂ of its rollouts that are correct:

    L = mean over tokens of w̄ · min(p_S(ŷ_t) / p_old(ŷ_t), 2) · JSD_½(p_T, p_S), w = [p̂(1 − p̂)]^½,

    w̄ = w / mean of w over groups with w > 0, which are those neither all right nor all wrong. It needs a reward. At
    `exponent` 0 it is SDPO. `curriculum="pass_rate"` draws such prompts more often as well, which the paper does not.

    Deviations: those of SDPO; the mean over groups is that of all that are sampled at once.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="SC-SDPO",
        paper="2605.27765",
        title="Restoring the Sweet Spot: Pass-Rate Weighted Self-Distillation for LLM Reasoning",
        citation=dedent("""\
            @article{liu2026restoring,
                title        = {{Restoring the Sweet Spot: Pass-Rate Weighted Self-Distillation for LLM Reasoning}},
                author       = {Zehao Liu and Yuanpu Cao and Jinghui Chen and Vasant G. Honavar},
                year         = 2026,
                eprint       = {arXiv:2605.27765},
            }"""),
        status="seen-paper",
    )


@dataclass(frozen=True)
class SweetSpot(TokenWeighting):
    """
    [p̂(1 − p̂)]^exponent of the group, divided by its mean over the groups, on all processes, in which it is not 0. 0 in
    groups without rewards.

    Args:
        exponent (`float`, *optional*, defaults to `0.5`):
            At 0, all groups with rewards weigh 1.
    """

    exponent: float = 0.5
    needs_reward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.exponent < 0:
            raise ValueError(f"`exponent` must not be negative, got {self.exponent}.")

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        weights = (batch.success_rate * (1 - batch.success_rate)).pow(self.exponent).nan_to_num(0.0)
        everywhere = batch.gather(weights)  # groups are equally large: a mean over rollouts is one over groups
        counted = (weights > 0).float()
        batch.log("groups/weighted_rate", counted.sum(), counted.new_tensor(len(counted)))
        return weights * (everywhere > 0).sum().clamp(min=1) / everywhere.sum().clamp(min=torch.finfo().tiny)
