"""What a guard is: something that is measured, held against what it was at first."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


ACTIONS = ("ignore", "warn", "stop", "rollback")


@dataclass(kw_only=True)
class Guard(ABC):
    """
    Watches what is measured. What is beyond its limits as often in a row as `patience` says is trouble.

    Args:
        action (`str`, *optional*, defaults to `"warn"`):
            What happens then: `"ignore"` watches nothing, `"warn"` warns, `"stop"` ends the training and saves it,
            `"rollback"` ends it with the best checkpoint from before.
        patience (`int`, *optional*, defaults to `1`):
            How often in a row.

    Attributes:
        advice (`str`):
            What usually helps.
        reads_log (`bool`):
            Whether it is shown what is logged, such as evaluations, and not what each optimizer step measured.
        since (`int`, *optional*):
            Step that it began with, if something is beyond the limits.
        beyond (`int`):
            How often in a row something has been.
        seen (`str`):
            What was seen last of it, as a sentence.
        blind (`str`):
            Why nothing will ever be beyond the limits, as a sentence, if so.
    """

    advice: ClassVar[str]
    reads_log: ClassVar[bool] = False

    action: str = "warn"
    patience: int = 1
    since: int | None = field(default=None, init=False, repr=False)
    beyond: int = field(default=0, init=False, repr=False)
    seen: str = field(default="", init=False, repr=False)
    blind: str = field(default="", init=False, repr=False)
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
            self.since = self._began(step) if self.since is None else self.since
            self.beyond, self.seen = self.beyond + 1, seen
        elif seen is not None:
            self.since, self.beyond, self.seen = None, 0, ""
        return seen is not None

    def _began(self, step: int) -> int:
        return step

    @property
    def has_trouble(self) -> bool:
        """Whether something has been beyond the limits as often as `patience` says."""
        return self.beyond >= self.patience

    @property
    def doubt(self) -> float:
        """The step that trouble begins with, if there is any, or else the first that it may turn out to."""
        return math.inf if self.since is None else self.since

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
    A [`Guard`] of one metric: its mean over the last measurements has limits that follow its mean over the first. The
    largest and the smallest of the last ones do not count, so that a single one is no trouble. A value that is NaN is
    no measurement.

    Args:
        baseline (`int`, *optional*, defaults to `5`):
            Number of the first measurements, in which there is no trouble yet.
        window (`int`, *optional*, defaults to `5`):
            Number of the last measurements. With 1 or 2, all count.

    Attributes:
        metric (`str`):
            Name of the metric.
        what (`str`):
            What it is, for messages.
    """

    metric: ClassVar[str]
    what: ClassVar[str]

    baseline: int = 5
    window: int = 5
    first: list[float] = field(default_factory=list, init=False, repr=False)
    last: list[tuple[int, float]] = field(default_factory=list, init=False, repr=False)
    _kept: ClassVar[tuple[str, ...]] = (*Guard._kept, "first", "last")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("baseline", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    def compared(self, mean: float) -> tuple[float, str]:
        """What a mean of the last measurements is held against, and how messages call that."""
        return math.fsum(self.first[: self.baseline]) / self.baseline, f"in the first {self.baseline}"

    @abstractmethod
    def limits(self, first: float) -> tuple[float, float]:
        """
        The least and the largest mean that are no trouble.

        Args:
            first (`float`):
                Mean of the first measurements, or what [`compared`] gives.
        """

    def value(self, measured: Mapping[str, float]) -> float:
        """The metric, NaN if it was not measured."""
        return measured.get(self.metric, math.nan)

    def judge(self, step: int, measured: Mapping[str, float]) -> str | None:
        value = self.value(measured)
        if math.isnan(value):
            return None
        if len(self.first) < self.baseline:
            self.first = [*self.first, value]
            return ""
        self.last = [*self.last, (step, value)][-self.window :]
        if len(self.last) < self.window:
            return ""
        values = sorted(value for _, value in self.last)
        values = values[1:-1] if len(values) > 2 else values
        mean = sum(values) / len(values)
        first, when = self.compared(mean)
        low, high = self.limits(first)
        if low <= mean <= high:
            return ""
        side, limit = ("below", low) if mean < low else ("above", high)
        return (
            f"{self.what} (`{self.metric}`) was {mean:.3g} in the last {self.window} measurements, {side} the limit "
            f"of {limit:.3g}; {when} it was {first:.3g}."
        )

    def _began(self, step: int) -> int:
        return self.last[0][0]

    @property
    def doubt(self) -> float:
        rest = self.last[-(self.window - 1) :] if self.window > 1 else []  # of the next window
        return rest[0][0] if self.since is None and rest else super().doubt

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.last = [(step, value) for step, value in self.last]


@dataclass(kw_only=True)
class Relative(MetricGuard):
    """
    A [`MetricGuard`] whose limits are multiples of the first mean. There are none where one of the first measurements
    is negative, as an estimate of little may be, or all are zero: a multiple of that mean would say nothing.

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
        if first <= 0.0 or any(value < 0.0 for value in self.first):
            self.blind = (
                f"The first {self.baseline} measurements of `{self.metric}` are not all positive, so limits that are "
                "multiples of their mean say nothing."
            )
            return -math.inf, math.inf
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


@dataclass(kw_only=True)
class Falling(MetricGuard):
    """
    A [`MetricGuard`] of a share, which may fall below its best mean so far by so much.

    Args:
        fall (`float`, *optional*, defaults to `0.25`):
            Most that is no trouble, in (0, 1].

    Attributes:
        best (`float`):
            The best mean so far, of the first measurements or of later ones.
    """

    fall: float = 0.25
    best: float = field(default=0.0, init=False, repr=False)
    _kept: ClassVar[tuple[str, ...]] = (*MetricGuard._kept, "best")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.fall <= 1.0:
            raise ValueError(f"`fall` must be in (0, 1], got {self.fall}.")

    def compared(self, mean: float) -> tuple[float, str]:
        self.best = max(self.best, mean, super().compared(mean)[0])
        return self.best, "at best"

    def limits(self, first: float) -> tuple[float, float]:
        return first - self.fall, math.inf
