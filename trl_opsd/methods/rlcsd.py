from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

import torch

from ..signal import Advantage, Batch, TokenScores
from ..trainer.checks.settings import check_mean_over_sequences
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class RLCSDConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 8,
        "privileged_context": "peers",
        "context_kwargs": {"correct": 1, "contrast": 4},
        "teacher": "periodic",
        "teacher_update_steps": 10,
        "divergence_coef": 0.0,
        "policy_loss_coef": 1.0,
        "advantage": "trl_opsd.methods.rlcsd.Contrast",
        "loss_type": "grpo",
        "temperature": 1.0,
        "top_p": 0.95,
        "top_k": 20,
        "max_completion_length": 16384,
        "learning_rate": 1e-6,
    },
):
    r"""
    Train with rewards, and credit what a right solution makes likelier than a wrong one does.

    Defaults of RLCSD, from [RLCSD: Reinforcement Learning with Contrastive On-Policy
    Self-Distillation](https://huggingface.co/papers/2606.11709). A copy of the policy, refreshed every 10
    steps, reads a rollout after another correct one of its prompt and, in the same words, after each of up to four
    wrong ones, so that what any hint does to the teacher cancels out. See [`Contrast`] for the formula. A rollout
    without both a correct and a wrong peer keeps its advantage. It needs a reward. The weights of the tokens are those
    of a mean over the tokens of each rollout: another `loss_type` is refused.

    The teacher reads each rollout up to five times. Rollouts and how they are sampled are those of the released
    code's configurations. Chosen here: peers are the first of the group, where the released code draws them; the
    advantage of a rollout without one of the two. Deviation: the wording of the teacher's prompt is this library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="RLCSD",
        paper="2606.11709",
        title="RLCSD: Reinforcement Learning with Contrastive On-Policy Self-Distillation",
        citation=dedent("""\
            @article{pan2026rlcsd,
                title        = {{RLCSD: Reinforcement Learning with Contrastive On-Policy Self-Distillation}},
                author       = {Leyi Pan and Shuchang Tao and Yunpeng Zhai and Lingzhe Zhang and Zhaoyang Liu and
                                Bolin Ding and Aiwei Liu and Lijie Wen},
                year         = 2026,
                eprint       = {arXiv:2606.11709},
            }"""),
        status="seen-paper, seen-code",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mean_over_sequences(self)


@dataclass(frozen=True)
class Contrast(Advantage):
    """
    max(0, A + r_t) if A ≥ 0 else min(0, A + r_t) at the tokens with |r_t| > `threshold`, A at the others, where

    r_t = `strength` · tanh(e_t / `scale`) and e_t = log p_T(y_t | correct peer) − log mean_k p_T(y_t | wrong peer k).

    Of a rollout, the mean over those tokens, times `weight`, is added to the mean over the others; a mean over nothing
    is left out. Where the teacher has not read both, A.

    Args:
        strength (`float`, *optional*, defaults to `0.5`):
            Largest |r_t|. At 0 this is GRPO.
        scale (`float`, *optional*, defaults to `0.02`):
            Difference, in nats, from which on r_t saturates.
        threshold (`float`, *optional*, defaults to `0.02`):
            |r_t| that a token has to exceed.
        weight (`float`, *optional*, defaults to `1.0`):
            η.
    """

    strength: float = 0.5
    scale: float = 0.02
    threshold: float = 0.02
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (self.strength >= 0 and self.scale > 0 and self.threshold >= 0 and self.weight >= 0):
            raise ValueError(
                "`strength`, `threshold` and `weight` must not be negative and `scale` must be positive, got "
                f"{self.strength}, {self.threshold}, {self.weight} and {self.scale}."
            )

    @property
    def needs_scores(self) -> bool:
        return self.strength != 0.0

    @property
    def needs_contrast(self) -> bool:
        return self.needs_scores

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        if scores is None:
            return batch.advantages
        assert scores.contrasted is not None
        assert scores.contrast_log_prob is not None
        advantages, contrasted = batch.advantages, scores.contrasted
        pull = self.strength * torch.tanh((scores.teacher_log_prob - scores.contrast_log_prob) / self.scale)
        marked = contrasted & (pull.abs() > self.threshold)
        batch.log("contrast/marked_token_rate", marked.sum(), contrasted.sum())
        pulled = torch.where(advantages >= 0, (advantages + pull).clamp(min=0), (advantages + pull).clamp(max=0))
        others = batch.mask & ~marked
        # The mean over all tokens that follows makes of these weights a mean over either set
        num_tokens, num_marked, num_others = (its.sum(1, keepdim=True) for its in (batch.mask, marked, others))
        pulled = pulled * (self.weight * num_tokens / num_marked.clamp(min=1))
        kept = torch.where(num_marked > 0, advantages * (num_tokens / num_others.clamp(min=1)), advantages)
        return torch.where(marked, pulled, kept)
