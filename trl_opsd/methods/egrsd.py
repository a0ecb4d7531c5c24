from dataclasses import dataclass, field
from textwrap import dedent
from typing import Any, ClassVar

import torch

from ..signal import Advantage, Batch, TokenScores
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class EGRSDConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 1,
        "privileged_context": "solution",
        "teacher": "initial",
        "divergence_coef": 0.0,
        "policy_loss_coef": 1.0,
        "advantage": "trl_opsd.methods.egrsd.EntropyGated",
        "loss_type": "dapo",
        "temperature": 1.1,
        "top_p": 0.95,
        "top_k": 20,
        "max_completion_length": 1024,
        "learning_rate": 5e-6,
        "max_grad_norm": 0.1,
    },
):
    r"""
    Train with rewards on single rollouts, and trust a teacher where it is certain.

    Defaults of EGRSD, from [Respecting Self-Uncertainty in On-Policy Self-Distillation for Efficient LLM
    Reasoning](https://huggingface.co/papers/2605.13255), for 4B and 8B models. The initial policy reads the reference
    solution. With one rollout per prompt there is no group: an advantage is what the reward is above the mean of the
    training so far, and a correct rollout earns more the shorter it is. See [`EntropyGated`] for the formula; the loss
    is the mean over all tokens of −Â_t·log p_S(ŷ_t). It needs a reward.

    Chosen here: a step of the warm-up and of the running statistics is a generation batch; while all rewards are the
    same, they are not divided by their deviation; the largest entropy is that of the generation batch, on all
    processes; both distributions are at the sampling temperature. A rollout that is used more than once
    (`num_iterations`, `steps_per_generation`) gets GRPO's clipped ratio, which the paper has no need of. The wording
    of the teacher's prompt is this library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="EGRSD",
        paper="2605.13255",
        title="Respecting Self-Uncertainty in On-Policy Self-Distillation for Efficient LLM Reasoning",
        citation=dedent("""\
            @article{ke2026respecting,
                title        = {{Respecting Self-Uncertainty in On-Policy Self-Distillation for Efficient LLM
                                Reasoning}},
                author       = {Junlong Ke and Zichen Wen and Weijia Li and Conghui He and Linfeng Zhang},
                year         = 2026,
                eprint       = {arXiv:2605.13255},
            }"""),
        status="seen-paper",
    )


@dataclass
class EntropyGated(Advantage):
    """
    A·clip((p_T / p_S)^sign(A), 1 ± ε)·clip(1 − γ·H_t / H_max, floor, 1) where the teacher has read the rollout, else
    A. H_t is the teacher's entropy, H_max the largest of the batch, at least 1 nat. A = (r − r̄) / σ_r with the reward
    r = 1[correct]·(1 + β·(1 − |ŷ| / L_max)), and with the mean and the deviation of r in all batches before; A = r − ½
    in the first ones. A rollout without a verdict has A = 0 and counts in neither.

    Args:
        length_bonus (`float`, *optional*, defaults to `0.5`):
            β. L_max is `max_completion_length`.
        clip (`float`, *optional*, defaults to `0.2`):
            ε.
        gate (`float`, *optional*, defaults to `0.3`):
            γ. With this and `clip` at 0, no teacher takes part.
        floor (`float`, *optional*, defaults to `0.1`):
            Least weight that the gate leaves.
        lookahead (`int`, *optional*, defaults to `0`):
            W. H_t is replaced by the least entropy of token t and the W after it.
        largest_of (`str`, *optional*, defaults to `"raw"`):
            Of which entropies H_max is the largest, where W is not 0: `"raw"`, those before they are replaced, as in
            the paper's eq. 8; or `"replaced"`, as in its Algorithm 1.
        warmup_steps (`int`, *optional*, defaults to `10`):
            Batches in which A = r − ½.
    """

    needs_group: ClassVar[bool] = False
    needs_teacher_entropy: ClassVar[bool] = True

    length_bonus: float = 0.5
    clip: float = 0.2
    gate: float = 0.3
    floor: float = 0.1
    lookahead: int = 0
    largest_of: str = "raw"
    warmup_steps: int = 10
    _past: dict[str, Any] = field(
        default_factory=lambda: {"num_batches": 0, "count": 0, "mean": 0.0, "squares": 0.0}, init=False
    )

    def __post_init__(self) -> None:
        if self.lookahead < 0:
            raise ValueError(f"`lookahead` must not be negative, got {self.lookahead}.")
        if self.largest_of not in ("raw", "replaced"):
            raise ValueError(f"`largest_of` must be one of ['raw', 'replaced'], got {self.largest_of!r}.")

    @property
    def needs_scores(self) -> bool:
        return self.clip != 0.0 or self.gate != 0.0

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        advantages = self._whitened(batch)
        if scores is None:
            return advantages
        ratio = (advantages.sign() * scores.delta).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        gate = self._gate(batch, scores)
        number = scores.known.sum()
        batch.log("entropy_gate", gate[scores.known].sum(), number)
        batch.log("teacher_ratio_clipped_rate", (clipped != ratio)[scores.known].sum(), number)
        return torch.where(scores.known, advantages * clipped * gate, advantages)

    def _whitened(self, batch: Batch) -> torch.Tensor:
        if batch.max_length is None:
            raise ValueError(
                "EntropyGated rewards short completions by `max_completion_length`, which is `None`. Set it."
            )
        shares, known = batch.mask.sum(dim=1, keepdim=True) / batch.max_length, ~batch.rewards.isnan()
        rewards = batch.correct * (1 + self.length_bonus * (1 - shares))
        past = self._past
        if past["num_batches"] < self.warmup_steps:
            advantages = rewards - 0.5
        else:
            deviation = (past["squares"] / max(past["count"], 1)) ** 0.5
            advantages = (rewards - past["mean"]) / (deviation or 1.0)
        if batch.is_training:
            self._remember(batch.gather(rewards.where(known, torch.nan)).flatten())
        return advantages.where(known, 0.0)

    def _remember(self, rewards: torch.Tensor) -> None:
        # The statistics of what is new, put together with those of what there was
        rewards, past = rewards[~rewards.isnan()].double().cpu(), self._past
        past["num_batches"] += 1
        if len(rewards) == 0:
            return
        mean, before, after = rewards.mean().item(), past["count"], past["count"] + len(rewards)
        squares, difference = (rewards - mean).square().sum().item(), mean - past["mean"]
        past["squares"] += squares + difference**2 * before * len(rewards) / after
        past["mean"] += difference * len(rewards) / after
        past["count"] = after

    def _gate(self, batch: Batch, scores: TokenScores) -> torch.Tensor:
        entropy = scores.teacher_entropy
        least = ahead = entropy.where(scores.known, torch.inf)
        for _ in range(self.lookahead):
            ahead = torch.nn.functional.pad(ahead[:, 1:], (0, 1), value=torch.inf)
            least = torch.minimum(least, ahead)
        counted = entropy if self.largest_of == "raw" else least
        largest = batch.gather(counted.where(scores.known, 0.0).amax().view(1)).max().clamp(min=1.0)
        return (1 - self.gate * least / largest).clamp(self.floor, 1.0)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._past)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._past = dict(state)
