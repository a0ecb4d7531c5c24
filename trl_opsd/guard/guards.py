"""The guards that ship. Their limits are measured on the study's arms (docs/guards.md)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

from .base import Falling, Guard, MetricGuard, Relative, Rising


@dataclass(kw_only=True)
class Entropy(Relative):
    """Entropy of the student: it falls where one answer takes all probability, and rises where none is left."""

    metric = "entropy"
    what = "The student's entropy"
    advice = (
        "a lower `learning_rate`, a teacher that moves less (`teacher='initial'`, or a larger "
        "`teacher_update_steps`), fewer steps."
    )

    low: float | None = 0.1
    high: float | None = 2.5


@dataclass(kw_only=True)
class Length(Relative):
    """Mean length of the student's rollouts."""

    metric = "rollouts/mean_length"
    what = "The mean length of rollouts"
    advice = (
        "where they grow, the end-of-turn token in what the teacher reads and a lower `learning_rate`; where they "
        "shrink, a teacher that is refreshed less often, fewer steps, or a reward beside the divergence."
    )

    low: float | None = 0.25
    high: float | None = 4.0


@dataclass(kw_only=True)
class Truncation(Rising):
    """Share of the student's rollouts that were cut off at their longest."""

    metric = "rollouts/truncated_rate"
    what = "The share of rollouts that were cut off"
    advice = "a lower `learning_rate`, a teacher that moves less, a longer `max_completion_length` if they still end."


@dataclass(kw_only=True)
class Repetition(Rising):
    """Share of the student's rollouts that end in a loop."""

    metric = "rollouts/repetition_rate"
    what = "The share of rollouts that end in a loop"
    advice = "a lower `learning_rate`, a teacher that moves less, fewer steps."

    rise: float = 0.1


@dataclass(kw_only=True)
class Correct(Falling):
    """Share of the student's rollouts that are right, where there are rewards."""

    metric = "rollouts/correct_rate"
    what = "The share of rollouts that are right"
    advice = "a lower `learning_rate`, a teacher that moves less, fewer steps."


@dataclass(kw_only=True)
class DivergenceGrowth(Relative):
    """Divergence of the student from the teacher, with what `divergence_clip` takes off: `clipped_mass`."""

    metric = "distillation_loss"
    what = "The divergence from the teacher"
    advice = "a lower `learning_rate`, or a teacher that moves less: training is to bring it down."

    high: float | None = 1.3

    def value(self, measured: Mapping[str, float]) -> float:
        return super().value(measured) + measured.get("clipped_mass", 0.0)


@dataclass(kw_only=True)
class TeacherGap(MetricGuard):
    """
    How unlikely the teacher finds what the student samples: log p_T − log p_S of the sampled tokens, in nats, a mean.

    Args:
        fall (`float`, *optional*, defaults to `0.5`):
            Most that it may fall below its first mean.
    """

    metric = "teacher_advantage"
    what = "The mean of log p_teacher − log p_student of the student's tokens"
    advice = "a lower `learning_rate`, fewer steps, `divergence='reverse_kl'`, which counts the student's own tokens."

    fall: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fall > 0.0:
            raise ValueError(f"`fall` must be positive, in nats, got {self.fall}.")

    def limits(self, first: float) -> tuple[float, float]:
        return first - self.fall, math.inf


@dataclass(kw_only=True)
class Clipped(Rising):
    """Share of the tokens of which `divergence_clip` cuts something off."""

    metric = "clipped_share"
    what = "The share of tokens that are clipped"
    advice = "a larger `divergence_clip`, or none: what is cut off has no gradient."


@dataclass(kw_only=True)
class Masked(Rising):
    """Share of the tokens in the loss that are masked because their divergence is not finite."""

    metric = "skipped_token_rate"
    what = "The share of tokens that are masked because their divergence is not finite"
    advice = "bf16 or fp32 instead of fp16, a lower `learning_rate`."

    rise: float = 0.1


@dataclass(kw_only=True)
class NonFinite(Guard):
    """
    Optimizer steps that are skipped because their gradient is not finite. They are skipped whatever this does.

    Args:
        patience (`int`, *optional*, defaults to `5`):
            Steps in a row.
    """

    advice = "bf16 or fp32 instead of fp16, a lower `learning_rate`, a smaller `max_grad_norm`."

    patience: int = 5

    def judge(self, step: int, measured: Mapping[str, float]) -> str | None:
        if measured["skipped_steps"]:
            return "The gradient is not finite, so the step was skipped."
        return ""


@dataclass(kw_only=True)
class Benchmark(Guard):
    """
    Accuracy on what is held out, against the best there was so far.

    Args:
        score (`str`, *optional*):
            What is logged of an evaluation, larger is better, such as `"eval_reward"`. `None` takes the mean of
            `avg@k` over the benchmarks that are evaluated while training.
        drop (`float`, *optional*, defaults to `0.05`):
            Most that it may be below the best. With benchmarks, it also has to be below by more than the 95 % interval
            of the difference, with Bonferroni's correction for the evaluations that the best is the best of.
        patience (`int`, *optional*, defaults to `2`):
            Evaluations in a row. With benchmarks, one that is two or three times as far below as it may be counts as
            two or three.

    Attributes:
        scores (`dict[int, float]`):
            The scores so far, by optimizer step.
        lows (`dict[int, float]`):
            Lower ends of their intervals, likewise.
    """

    advice = "fewer steps, a lower `learning_rate`, a teacher that moves less."
    reads_log = True

    patience: int = 2
    score: str | None = None
    drop: float = 0.05
    scores: dict[int, float] = field(default_factory=dict, init=False, repr=False)
    lows: dict[int, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.drop > 0.0:
            raise ValueError(f"`drop` must be positive, got {self.drop}.")

    def judge(self, step: int, measured: Mapping[str, float]) -> str | None:
        if self.score is not None:
            names = [self.score] if self.score in measured else []
        else:
            names = [
                name
                for name in measured
                if name.startswith("eval_") and "/avg@" in name and "_" not in name.split("/avg@")[1]
            ]
        if not names:
            return None
        value, low, high = (
            sum(measured.get(name + end, measured[name]) for name in names) / len(names)
            for end in ("", "_low", "_high")
        )
        if math.isnan(value):
            return None
        self.scores, self.lows = {**self.scores, step: value}, {**self.lows, step: low}
        best_step = max(self.scores, key=lambda one: self.scores[one])
        best = self.scores[best_step]
        quantile = NormalDist().inv_cdf
        # The best of many is so by luck as well
        widened = quantile(1 - 0.025 / max(1, len(self.scores) - 1)) / quantile(0.975)
        chance = widened * math.hypot(best - self.lows[best_step], high - value)
        loss, limit = best - value, max(self.drop, chance)
        if loss <= limit:
            return ""
        if chance:  # Without an interval, even a large loss may be chance
            self.beyond += int(loss / limit) - 1
        what = "The mean accuracy on the benchmarks" if self.score is None else f"`{self.score}`"
        return f"{what} is {value:.3g}, and was {best:.3g} at step {best_step}."

    def state_dict(self):
        return {**super().state_dict(), "scores": list(self.scores.items()), "lows": list(self.lows.items())}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.scores, self.lows = dict(state["scores"]), dict(state["lows"])


GUARDS: dict[str, type[Guard]] = {
    "non_finite": NonFinite,
    "entropy": Entropy,
    "length": Length,
    "truncation": Truncation,
    "repetition": Repetition,
    "correct": Correct,
    "divergence": DivergenceGrowth,
    "teacher_gap": TeacherGap,
    "clipped": Clipped,
    "masked": Masked,
    "benchmark": Benchmark,
}
