import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.nn.functional import softplus

from ..signal import Advantage, Batch, TokenScores
from ..trainer.method import Method
from .antisd import AntiSDConfig


@dataclass
class AntiSDCodeConfig(
    AntiSDConfig,
    defaults={
        "context_kwargs": {"correct": 1, "strip_thinking": True},
        "advantage": "trl_opsd.methods.antisd_code.StandardisedAway",
        "schedules": None,
    },
):
    r"""
    Train with rewards, and away from a teacher by as much as it is perplexed.

    Defaults of the released code of AntiSD, from [Anti-Self-Distillation for Reasoning RL via Pointwise Mutual
    Information](https://huggingface.co/papers/2605.11609), which is another algorithm than the paper's
    ([`AntiSDConfig`]): the push away is standardised within each rollout, so that about half of its tokens are pulled,
    and its strength and its gate follow the teacher's perplexity. The teacher is the current policy reading another
    correct rollout of the same prompt; where there is none, a rollout keeps its advantage. See [`StandardisedAway`].
    It needs a reward.

    Chosen here, as our notes of the code do not say: the warm-up's median is over its rollouts, and its deviation over
    its tokens; a step is a generation batch; the reference of the gate is that median. Deviations: the student's
    probabilities are those from before the update, where the code takes the current ones; the rollout that is shown is
    the first correct one, where the code draws one, and it is neither cut after its answer nor to 3,072 tokens; the
    teacher is not told whether the rollout that it scores is correct; the code's option to leave out rollouts of
    12,000 tokens and more is not offered; the wording of the prompt is this library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="AntiSD-Code",
        paper="2605.11609",
        title=AntiSDConfig.method.title,
        citation=AntiSDConfig.method.citation,
        status="seen-code",
    )


@dataclass
class StandardisedAway(Advantage):
    """
    A + λ·clamp(z_t, ±5) where the teacher has read the rollout, else A. z is −φ(clamp(δ_t, ±5)), with φ(u) =
    ½(softplus(u) − log 2), brought to mean 0 and variance 1 within the rollout; before, δ_t is set to 0 where it is
    more than 2σ from it. λ = clamp(2·strength·ln(clamp(p / p*, ½, 3)), 0, ½) with the rollout's perplexity p =
    exp(−mean log p_T(y_t)) under the teacher, and p* = `low` times the median of p in the warm-up; 0 in the warm-up,
    where p is above `most_perplexity`, and while the gate is closed. σ is the deviation of δ in the warm-up.

    Where teacher and student agree on all of a rollout up to rounding, it is rounding that is standardised.

    The gate closes after a batch whose mean of p is below `low` times that median, and opens after one above `high`
    times it. It is open after the warm-up.

    Args:
        strength (`float`, *optional*, defaults to `0.1`):
            Of λ. At 0 this is GRPO.
        low (`float`, *optional*, defaults to `0.93`):
            Of the perplexity at which λ begins, and the gate closes.
        high (`float`, *optional*, defaults to `1.07`):
            Of the one at which the gate opens.
        most_perplexity (`float`, *optional*, defaults to `3.0`):
            Above it, nothing is made of the teacher.
        warmup_steps (`int`, *optional*, defaults to `5`):
            Batches that the references are taken from.
    """

    strength: float = 0.1
    low: float = 0.93
    high: float = 1.07
    most_perplexity: float = 3.0
    warmup_steps: int = 5
    _past: dict[str, Any] = field(
        default_factory=lambda: {"num_batches": 0, "perplexities": [], "moments": [0.0, 0.0, 0.0], "is_open": True},
        init=False,
    )

    def __post_init__(self) -> None:
        if self.warmup_steps < 1:
            raise ValueError(f"`warmup_steps` must be at least 1, got {self.warmup_steps}.")

    @property
    def needs_scores(self) -> bool:
        return self.strength != 0.0

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        if scores is None:
            return batch.advantages
        known, delta = scores.known, scores.delta
        lengths = known.sum(dim=1, keepdim=True)
        perplexities = (-scores.teacher_log_prob.sum(dim=1, keepdim=True) / lengths).exp()  # NaN if nothing is read
        strengths, shaped = torch.zeros_like(batch.advantages), batch.advantages
        if self._past["num_batches"] >= self.warmup_steps:
            median, deviation = self._references()
            strengths = self._strengths(perplexities, median).nan_to_num(0.0)
            pushes = self._pushes(delta, known, deviation)
            shaped = torch.where(known & (strengths > 0), batch.advantages + strengths * pushes, batch.advantages)
        is_read = lengths > 0
        number, is_open = is_read.sum(), torch.ones_like(lengths) * self._past["is_open"]
        batch.log("away/strength", strengths[is_read].sum(), number)
        batch.log("away/gate", is_open[is_read].sum(), number)
        batch.log("away/teacher_perplexity", perplexities[is_read].sum(), number)
        if batch.is_training:
            self._remember(batch, perplexities, delta[known])
        return shaped

    def _references(self) -> tuple[float, float]:
        """The median of the perplexities, and the deviation of δ, in the warm-up."""
        number, total, squares = self._past["moments"]
        seen = torch.tensor(self._past["perplexities"] or [1.0], dtype=torch.float64)
        variance = squares / max(number, 1.0) - (total / max(number, 1.0)) ** 2
        return seen.quantile(0.5).item(), math.sqrt(max(variance, 0.0))

    def _strengths(self, perplexities: torch.Tensor, median: float) -> torch.Tensor:
        shares = (perplexities / (self.low * median)).clamp(0.5, 3.0)
        counts = (perplexities <= self.most_perplexity) & self._past["is_open"]
        return (2 * self.strength * shares.log()).clamp(0.0, 0.5) * counts

    @staticmethod
    def _pushes(delta: torch.Tensor, known: torch.Tensor, deviation: float) -> torch.Tensor:
        usual = delta.where(delta.abs() <= 2 * deviation, 0.0).clamp(-5.0, 5.0)
        pushes = -0.5 * (softplus(usual) - math.log(2.0)) * known
        number = known.sum(dim=1, keepdim=True).clamp(min=1)
        centred = (pushes - pushes.sum(dim=1, keepdim=True) / number) * known
        spread = (centred.square().sum(dim=1, keepdim=True) / number).sqrt()
        return (centred / (spread + 1e-6)).clamp(-5.0, 5.0)

    def _remember(self, batch: Batch, perplexities: torch.Tensor, delta: torch.Tensor) -> None:
        past, seen = self._past, batch.gather(perplexities).flatten()
        seen = seen[~seen.isnan()].double().cpu()
        delta = delta.double()
        moments = batch.gather(
            torch.stack([delta.new_tensor(len(delta)), delta.sum(), delta.square().sum()]).view(1, 3)
        )
        past["num_batches"] += 1
        if past["num_batches"] <= self.warmup_steps:
            past["perplexities"] = [*past["perplexities"], *seen.tolist()]
            past["moments"] = [
                one + new for one, new in zip(past["moments"], moments.sum(dim=0).tolist(), strict=True)
            ]
        elif len(seen):
            share = seen.mean().item() / self._references()[0]
            past["is_open"] = share >= self.low if past["is_open"] else share > self.high

    def state_dict(self) -> dict[str, Any]:
        return dict(self._past)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._past = dict(state)
