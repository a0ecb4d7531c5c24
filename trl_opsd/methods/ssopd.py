from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

import torch

from ..context import Rollout, Rollouts, SiblingContext
from ..signal import Batch, TokenScores, TokenWeighting
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class SSOPDConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 8,
        "privileged_context": "trl_opsd.methods.ssopd.ShortestForLongest",
        "teacher": "initial",
        "divergence": "forward_kl",
        "divergence_clip": 0.05,
        "divergence_coef": 0.5,
        "policy_loss_coef": 1.0,
        "token_weights": {"keep_first": {"num_tokens": 1024}, "trl_opsd.methods.ssopd.Undecided": {}},
        "temperature": 1.2,
        "max_completion_length": 16000,
        "learning_rate": 5e-6,
    },
):
    r"""
    Train with rewards, and let the best success of a group teach its worst failure.

    Defaults of SSOPD, from [Self-Supervised On-Policy Distillation for Reasoning Language
    Models](https://huggingface.co/papers/2605.17497). Of each group of 8 rollouts, the shortest correct one y⁺ is what
    the initial policy reads while it scores the longest wrong one y⁻:

    L = GRPO + mean over prompts of λ₀·4p̂(1 − p̂) · 1/K Σ_{t ≤ K} Σ_v min(p_T log(p_T / p_S), 0.05),

    with p_T = p(· | x, y⁺, y⁻₍<t₎), p_S = p(· | x, y⁻₍<t₎), K = min(1024, |y⁻|), p̂ the share of correct rollouts and
    λ₀ = `divergence_coef`. All other rollouts have no context, so that a group whose rollouts are all right or all
    wrong has GRPO's loss alone. It needs a reward.

    The clip makes the loss negative where it cuts much, and may push down the very token that the teacher prefers.

    Chosen here: equally long rollouts are taken in their order; the wording of the teacher's prompt; neither side's
    chat template is told whether to think.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="SSOPD",
        paper="2605.17497",
        title="Self-Supervised On-Policy Distillation for Reasoning Language Models",
        citation=dedent("""\
            @article{tan2026selfsupervised,
                title        = {{Self-Supervised On-Policy Distillation for Reasoning Language Models}},
                author       = {Zhiquan Tan and Yinrong Hong},
                year         = 2026,
                eprint       = {arXiv:2605.17497},
            }"""),
        status="seen-paper",
    )


class ShortestForLongest(SiblingContext):
    """
    The teacher of the longest wrong rollout of a group reads the shortest correct one. No other rollout has a context.

    Args:
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and `{attempt}`, besides any dataset
            columns.
        strip_thinking (`bool`, *optional*, defaults to `False`):
            Whether to leave out the attempt's reasoning up to `</think>`.
    """

    def chosen(self, rollouts: Rollouts) -> Rollout | None:
        wrong = [one for one in rollouts.all if one.correct is False]
        if not wrong or max(wrong, key=_length) is not rollouts.own:
            return None
        correct = [one for one in rollouts.all if one.correct and self.shown(one)]
        return min(correct, key=_length, default=None)


def _length(rollout: Rollout) -> int:
    return len(rollout.token_ids)


@dataclass(frozen=True)
class Undecided(TokenWeighting):
    """
    4p̂(1 − p̂), p̂ being the share of correct rollouts of the prompt, divided by the share of groups that have a row with
    a context: the mean over such rows becomes one over all prompts.
    """

    terms: ClassVar[tuple[str, ...]] = ("divergence",)
    needs_reward: ClassVar[bool] = True

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        weights = 4 * batch.success_rate * (1 - batch.success_rate)
        num_prompts = len(weights) / batch.group(weights).size(1)
        pairs = batch.has_context.float()
        batch.log("groups/pair_rate", pairs.sum(), pairs.new_tensor(num_prompts))
        batch.log("groups/mean_weight", (weights * pairs).nansum(), pairs.sum())
        share = batch.gather(pairs).mean() * batch.group(weights).size(1)
        return torch.where(batch.has_context, weights * share, 0.0)
