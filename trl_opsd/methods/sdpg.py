from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

import torch

from ..signal import Batch, Schedule, TokenScores, TokenWeighting
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class SDPGConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 8,
        "privileged_context": "answer",
        "teacher": "live",
        "divergence": "reverse_kl",
        "divergence_coef": 0.001,
        "policy_loss_coef": 1.0,
        "token_weights": {"trl_opsd.methods.sdpg.PositiveAdvantage": {}},
        "beta": 0.001,
        "loss_type": "dapo",
        "epsilon_high": 0.28,
        "temperature": 1.0,
        "max_completion_length": 2048,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
    },
):
    r"""
    Train with rewards, and have what succeeds follow a teacher that knows the answer.

    Defaults of SDPG, from [Self-Distilled Policy Gradient](https://huggingface.co/papers/2606.04036), with the
    constants of the released code. To GRPO's loss on 8 rollouts, with its KL to the initial policy (`beta`), is added
    the reverse KL to the current policy that reads the answer c, over the whole vocabulary, on rollouts whose
    advantage A is positive:

    L = L_GRPO + mean over tokens of β(k)·1[A > 0]·KL(p_S‖p_T),

    with p_S = p(· | x, ŷ₍<t₎) and p_T = p(· | x, c, ŷ₍<t₎), the mean being over the tokens of all rollouts. It needs a
    reward and an `answer` column.

    The released code's launchers leave the restriction to A > 0 off: `token_weights={}`. β = `divergence_coef` is
    constant, as in them; the code's β(k), which rises in the first steps k and falls in the last, is [`RiseAndFall`].
    Deviations: the KL to the initial policy is GRPO's, the code's `ufkl`, where the launchers take half the squared
    log-ratio (`urkl`); the KL of a token is not capped at 20; no dual clip, no filter of groups that are all right or
    all wrong and no penalty of long completions, which the launchers have; the wording of the prompts is this
    library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="SDPG",
        paper="2606.04036",
        title="Self-Distilled Policy Gradient",
        citation=dedent("""\
            @article{liu2026selfdistilled,
                title        = {{Self-Distilled Policy Gradient}},
                author       = {Yifeng Liu and Shiyuan Zhang and Yifan Zhang and Quanquan Gu},
                year         = 2026,
                eprint       = {arXiv:2606.04036},
            }"""),
        status="notes, seen-code",
    )


class PositiveAdvantage(TokenWeighting):
    """1 in the divergence where GRPO's advantage is above 0, else 0. All tokens count in the mean."""

    terms: ClassVar[tuple[str, ...]] = ("divergence",)
    needs_reward: ClassVar[bool] = True

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        is_positive = batch.advantages > 0
        batch.log("positive_advantage_rate", is_positive.sum(), torch.ones_like(is_positive).sum())
        return is_positive.float()


@dataclass(frozen=True)
class RiseAndFall(Schedule):
    """
    From 0 in a straight line to `value` in the first steps, and back to 0 in the last.

    Args:
        value (`float`):
            Coefficient between them.
        total_steps (`int`):
            Optimizer steps of the run.
        warmup_steps (`int`, *optional*, defaults to `0`):
            Number of the first.
        decay_steps (`int`, *optional*, defaults to `0`):
            Number of the last.
    """

    value: float
    total_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0

    def __post_init__(self) -> None:
        if min(self.warmup_steps, self.decay_steps) < 0 or self.warmup_steps + self.decay_steps > self.total_steps:
            raise ValueError(
                f"`warmup_steps` and `decay_steps` must not be negative, nor more than `total_steps` together, got "
                f"{self.warmup_steps}, {self.decay_steps} and {self.total_steps}."
            )

    def __call__(self, step: int) -> float:
        rise = step / self.warmup_steps if self.warmup_steps else 1.0
        fall = (self.total_steps - step) / self.decay_steps if self.decay_steps else 1.0
        return self.value * max(0.0, min(rise, fall, 1.0))
