from dataclasses import dataclass, field
from textwrap import dedent
from typing import Any, ClassVar

import torch
from torch.nn.functional import logsigmoid

from ..signal import Batch, TokenScores, TokenWeighting
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class VPDConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 8,
        "privileged_context": "peers",
        "context_kwargs": {"correct": 1},
        "teacher": "live",
        "divergence": "jsd",
        "jsd_weight": 0.5,
        "divergence_support": "student_top_k",
        "divergence_top_k": 100,
        "divergence_tail": "bucket",
        "likelihood_coef": 1.0,
        "token_weights": {"trl_opsd.methods.vpd.EStep": {"every": 5, "beta": 0.1, "decay": 0.9}},
        "loss_type": "luspo",
        "temperature": 1.0,
        "chat_template_kwargs": {"enable_thinking": False},
        "max_completion_length": 8192,
        "learning_rate": 1e-5,
    },
):
    r"""
    Teach the policy to make use of a peer or of feedback, and then to do without, in turns.

    Defaults of VPD, from [Learning from Language Feedback via Variational Policy
    Distillation](https://huggingface.co/papers/2605.15113), for scientific questions. One network is both the student
    and the teacher q, which reads another correct rollout c of the same prompt. In the M-step, the student learns from
    it on its rollouts:

    L_M = mean over rollouts of Σ_t JSD_½(q(· | x, c, ŷ₍<t₎), p_S(· | x, ŷ₍<t₎)),

    over the student's 100 most probable tokens and one entry for all others. In the E-step of every fifth generation
    batch, the teacher learns to tell right rollouts from wrong ones, see [`EStep`]: the gradient goes through the pass
    that reads c. A rollout without a context, as in a group without success, is in neither step. It needs a reward.

    On mathematics the paper takes `divergence="forward_kl"` over the whole vocabulary and a learning rate of 5e-6; for
    code, `privileged_context="feedback"`, a reverse KL over 20 tokens and a rate of 1e-6; `"reflection"` is its
    self-critique. Its text has one network, its tables list the rate of a moving average too: this is the text's.

    Deviations: a batch with an E-step has no M-step, where the paper's has both, one after the other; the slope of
    L_E is that of the policy that sampled, which is exact where a generation serves one optimizer step; the wording of
    the teacher's prompt is this library's. Chosen here: δ moves by `decay` 0.9, which the paper does not print, and
    the sum over a rollout's tokens in L_M (`loss_type`).

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="VPD",
        paper="2605.15113",
        title="Learning from Language Feedback via Variational Policy Distillation",
        citation=dedent("""\
            @article{li2026learning,
                title        = {{Learning from Language Feedback via Variational Policy Distillation}},
                author       = {Yang Li and Erik Nijkamp and Semih Yavuz and Shafiq Joty},
                year         = 2026,
                eprint       = {arXiv:2605.15113},
            }"""),
        status="seen-paper",
    )


@dataclass
class EStep(TokenWeighting):
    """
    In every n-th generation batch, instead of the divergence,

    L_E = −mean over right rollouts of log σ(r̃ − δ) − mean over wrong ones of log σ(δ − r̃),

    with r̃ = β·Σ_t [log q(ŷ_t | x, c, ŷ₍<t₎) − log p_S(ŷ_t | x, ŷ₍<t₎)], where p_S has no gradient, by the slope of
    each token's log q. δ is a moving average of ½(mean r̃ of the right + mean r̃ of the wrong), that of the batch
    included. A batch in which none is right, or none is wrong, of those with a context, has its divergence instead.

    Args:
        every (`int`, *optional*, defaults to `5`):
            n.
        beta (`float`, *optional*, defaults to `0.1`):
            β.
        decay (`float`, *optional*, defaults to `0.9`):
            Share of δ that stays. At 0, δ is that of the batch.
    """

    every: int = 5
    beta: float = 0.1
    decay: float = 0.9
    selects: ClassVar[bool] = True
    needs_reward: ClassVar[bool] = True
    changes_prompt: ClassVar[bool] = True
    _num_batches: int = field(default=0, init=False)
    _delta: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"`every` must be at least 1, got {self.every}.")
        if not self.beta > 0:
            raise ValueError(f"`beta` must be positive, got {self.beta}.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {self.decay}.")

    @property
    def needs_scores(self) -> bool:
        """Whether the next batch is an n-th one."""
        return self._num_batches % self.every == self.every - 1

    def state_dict(self) -> dict[str, Any]:
        return {"num_batches": self._num_batches, "delta": self._delta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_batches, self._delta = state["num_batches"], state["delta"]

    def __call__(self, batch: Batch, scores: TokenScores | None) -> dict[str, torch.Tensor]:
        is_due = batch.is_training and self.needs_scores
        self._num_batches += batch.is_training
        slopes = self._slopes(batch, scores) if is_due else None
        self.reads_context = slopes is not None
        nothing = torch.zeros_like(batch.correct, dtype=torch.float32)
        one = torch.ones_like(nothing[:1, 0])
        if batch.is_training:
            batch.log("e_step/rate", one.sum() * self.reads_context, one.sum())
            batch.log("e_step/skip_rate", one.sum() * (is_due and slopes is None), one.sum() * is_due)
        if slopes is None:
            return {"divergence": nothing + 1, "likelihood": nothing}
        return {"divergence": nothing, "likelihood": batch.own(slopes).unsqueeze(1)}

    def _slopes(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor | None:
        """Of L_E in −log q, as the weights of a mean over the rows, for those of all processes."""
        assert scores is not None
        is_whole = batch.mask.any(dim=1, keepdim=True) & (scores.known == batch.mask).all(dim=1, keepdim=True)
        is_whole &= ~batch.rewards.isnan()
        ratios = self.beta * scores.delta.sum(dim=1, keepdim=True)
        ratio, whole, correct = batch.gather(torch.cat([ratios, is_whole, batch.correct], dim=1)).unbind(dim=1)
        right, wrong = (whole * correct).bool(), (whole * (1 - correct)).bool()
        if not right.any() or not wrong.any():
            return None
        means = ratio[right].mean(), ratio[wrong].mean()
        middle = 0.5 * (means[0] + means[1]).item()
        self._delta = middle if self._delta is None else self.decay * self._delta + (1 - self.decay) * middle
        margins = torch.where(right, 1.0, -1.0) * (ratio - self._delta)
        losses, one = -logsigmoid(margins), torch.ones_like(means[0])
        batch.log("e_step/loss", losses[right].mean() + losses[wrong].mean(), one)
        batch.log("e_step/margin", means[0] - means[1], one)
        batch.log("e_step/delta", self._delta * one, one)
        slopes = torch.zeros_like(ratio)
        for some, sign in ((right, 1.0), (wrong, -1.0)):
            share = (right | wrong).sum() / some.sum()  # of a mean over these in one over both
            # One that is certain is counted too
            tiny = torch.finfo(ratio.dtype).tiny
            slopes[some] = sign * self.beta * share * torch.sigmoid(-margins[some]).clamp(min=tiny)
        return slopes
