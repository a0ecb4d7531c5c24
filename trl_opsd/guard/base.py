"""What a guard is: something that is measured, held against what it was at first."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


ACTIONS = ("off", "warn", "stop", "rollback")


@dataclass(kw_only=True)
class Guard(ABC):
    """
    Watches what is measured. As many measurements in a row beyond its limits as `patience` says are trouble.

    Args:
        action (`str`, *optional*, defaults to `"warn"`):
            What happens then: `"off"` watches nothing, `"warn"` warns, `"stop"` ends the training with a checkpoint,
            `"rollback"` ends it with the best checkpoint from before.
        patience (`int`, *optional*, defaults to `5`):
            Measurements in a row.

    Attributes:
        advice (`str`):
            What usually helps.
        reads_log (`bool`):
            Whether it is shown what is logged, such as evaluations, and not what each optimizer step measured.
        since (`int`, *optional*):
            Step of the first measurement beyond the limits, if the last one was.
        beyond (`int`):
            How many there have been in a row.
        seen (`str`):
            What the last one of them was, as a sentence.
    """

    advice: ClassVar[str]
    reads_log: ClassVar[bool] = False

    action: str = "warn"
    patience: int = 5
    since: int | None = field(default=None, init=False, repr=False)
    beyond: int = field(default=0, init=False, repr=False)
    seen: str = field(default="", init=False, repr=False)
    _kept: ClassVar[tuple[str, ...]] = ("since", "beyond", "seen")

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"`action` must be one of {ACTIONS}, got {self.action!r}.")
        if self.patience < 1:
            raise ValueError(f"`patience` must be at least 1, got {self.patience}.")

    @abstractmethod
    def judge(self, step: int, measured: Mapping[str, float]) -> str | None:
        """
        Look at what was measured.

        Args:
            step (`int`):
                Number of optimizer steps taken.
            measured (`Mapping[str, float]`):
                Values by name, alike on all processes.

        Returns:
            `str`, *optional*: what is beyond the limits, `""` if nothing is, `None` if nothing was measured.
        """

    def observe(self, step: int, measured: Mapping[str, float]) -> bool:
        """
        See what was measured, see [`judge`].

        Returns:
            `bool`: whether that was a measurement.
        """
        seen = self.judge(step, measured)
        if seen:
            self.since = step if self.since is None else self.since
            self.beyond, self.seen = self.beyond + 1, seen
        elif seen is not None:
            self.since, self.beyond, self.seen = None, 0, ""
        return seen is not None

    @property
    def has_trouble(self) -> bool:
        """Whether there were as many measurements beyond the limits as `patience` says."""
        return self.beyond >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with, as JSON holds it."""
        return {name: getattr(self, name) for name in self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what [`state_dict`] gave."""
        for name in self._kept:
            setattr(self, name, state[name])


@dataclass(kw_only=True)
class MetricGuard(Guard):
    """
    A [`Guard`] of one metric, whose limits follow its mean over the first measurements. A value that is NaN is none.

    Args:
        baseline (`int`, *optional*, defaults to `10`):
            First measurements, in which there is no trouble yet.

    Attributes:
        metric (`str`):
            Name of the metric.
        what (`str`):
            What it is, for messages.
    """

    metric: ClassVar[str]
    what: ClassVar[str]

    baseline: int = 10
    first: list[float] = field(default_factory=list, init=False, repr=False)
    _kept: ClassVar[tuple[str, ...]] = (*Guard._kept, "first")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline < 1:
            raise ValueError(f"`baseline` must be at least 1, got {self.baseline}.")

    @abstractmethod
    def limits(self, first: float) -> tuple[float, float]:
        """
        The least and the largest value that are no trouble.

        Args:
            first (`float`):
                Mean of the first measurements.
        """

    def judge(self, step: int, measured: Mapping[str, float]) -> str | None:
        value = measured.get(self.metric, math.nan)
        if math.isnan(value):
            return None
        if len(self.first) < self.baseline:
            self.first = [*self.first, value]
            return ""
        first = math.fsum(self.first[: self.baseline]) / self.baseline
        low, high = self.limits(first)
        if low <= value <= high:
            return ""
        side, limit = ("below", low) if value < low else ("above", high)
        return (
            f"{self.what} (`{self.metric}`) is {value:.3g}, {side} the limit of {limit:.3g}. Its mean over the first "
            f"{self.baseline} measurements was {first:.3g}."
        )


@dataclass(kw_only=True)
class Relative(MetricGuard):
    """
    A [`MetricGuard`] whose limits are multiples of the first mean.

    Args:
        low (`float`, *optional*):
            Least share of it that is no trouble. `None` for no such limit.
        high (`float`, *optional*):
            Largest multiple of it, likewise.
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low is not None and not 0.0 <= self.low < 1.0:
            raise ValueError(f"`low` must be in [0, 1), a share of the first mean, got {self.low}.")
        if self.high is not None and not self.high > 1.0:
            raise ValueError(f"`high` must be above 1, a multiple of the first mean, got {self.high}.")

    def limits(self, first: float) -> tuple[float, float]:
        return (
            -math.inf if self.low is None else self.low * first,
            math.inf if self.high is None else self.high * first,
        )


@dataclass(kw_only=True)
class Rising(MetricGuard):
    """
    A [`MetricGuard`] of a share, which may rise above its first mean by so much.

    Args:
        rise (`float`, *optional*, defaults to `0.2`):
            Most that is no trouble, in (0, 1].
    """

    rise: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.rise <= 1.0:
            raise ValueError(f"`rise` must be in (0, 1], got {self.rise}.")

    def limits(self, first: float) -> tuple[float, float]:
        return -math.inf, first + self.rise
