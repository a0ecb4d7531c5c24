"""Coefficients that change as training goes on."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


# Metrics that come from what student and teacher say of tokens
SCORED_METRICS = (
    "distillation_loss",
    "entropy",
    "teacher_advantage",
    "top_k_overlap",
    "student_mass_on_teacher_top_k",
    "teacher_entropy",
    "entropy_gap",
    "clipped_share",
    "clipped_mass",
    "skipped_token_rate",
)


class Schedule(ABC):
    """
    A coefficient as a function of the number of optimizer steps taken. One with a memory puts it into checkpoints.

    Attributes:
        metric (`str`, *optional*):
            The metric that it follows. One that only student and teacher give ([`SCORED_METRICS`]) is measured as long
            as there is the schedule, whatever the coefficients are.
    """

    metric: str | None = None

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The coefficient in the step after `step` others."""

    def observe(self, step: int, statistics: Mapping[str, float]) -> None:
        """See the metrics of the step that has just been taken, step number `step`, alike on all processes."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with, as JSON holds it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what [`state_dict`] gave."""


@dataclass(frozen=True)
class Linear(Schedule):
    """
    `start` for `delay` steps, then in a straight line to `end`, which is reached after `num_steps` more and kept.

    Args:
        start (`float`):
            First value.
        end (`float`):
            Last value.
        num_steps (`int`):
            Length of the way between them, in optimizer steps.
        delay (`int`, *optional*, defaults to `0`):
            Optimizer steps before it begins.
    """

    start: float
    end: float
    num_steps: int
    delay: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.delay < 0:
            raise ValueError(
                f"`num_steps` must be at least 1 and `delay` at least 0, got {self.num_steps} and {self.delay}."
            )

    def __call__(self, step: int) -> float:
        share = min(max(step - self.delay, 0) / self.num_steps, 1.0)
        return self.start + share * (self.end - self.start)


@dataclass
class Hysteresis(Schedule):
    """
    A gate: `value` while a metric is high enough compared with what it was at first, 0 once it has fallen too far, as
    [AntiSD](https://huggingface.co/papers/2605.11609) gates by the teacher's entropy.

    Args:
        value (`float`):
            Coefficient while the gate is open.
        metric (`str`, *optional*, defaults to `"teacher_entropy"`):
            Logged metric, a mean over the tokens of a step.
        low (`float`, *optional*, defaults to `0.93`):
            The gate closes below this share of the metric's mean in the first steps.
        high (`float`, *optional*, defaults to `1.0`):
            It opens again from this share on.
        warmup_steps (`int`, *optional*, defaults to `5`):
            Optimizer steps in which that mean is taken. The coefficient is 0 in them, and the gate is open after.
    """

    value: float
    metric: str = "teacher_entropy"
    low: float = 0.93
    high: float = 1.0
    warmup_steps: int = 5
    _is_open: bool = field(default=True, init=False)
    _first_values: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"`low` must not be above `high`, got {self.low} and {self.high}.")
        if self.warmup_steps < 1:
            raise ValueError(f"`warmup_steps` must be at least 1, got {self.warmup_steps}.")

    def __call__(self, step: int) -> float:
        return self.value if self._is_open and len(self._first_values) >= self.warmup_steps else 0.0

    def observe(self, step: int, statistics: Mapping[str, float]) -> None:
        value = statistics.get(self.metric)
        if value is None:  # nothing was measured in this step
            return
        if len(self._first_values) < self.warmup_steps:
            self._first_values.append(value)
            return
        share = value / (sum(self._first_values) / self.warmup_steps)
        self._is_open = share >= (self.low if self._is_open else self.high)

    def state_dict(self) -> dict[str, Any]:
        return {"is_open": self._is_open, "first_values": self._first_values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._is_open, self._first_values = state["is_open"], list(state["first_values"])


SCHEDULES = {"linear": Linear, "hysteresis": Hysteresis}
