"""Callbacks that watch a run."""

from .base import ACTIONS, Falling, Guard, MetricGuard, Relative, Rising
from .guards import GUARDS, Benchmark
from .non_finite import SkipNonFiniteSteps
from .watch import Guards


__all__ = [
    "ACTIONS",
    "GUARDS",
    "Benchmark",
    "Falling",
    "Guard",
    "Guards",
    "MetricGuard",
    "Relative",
    "Rising",
    "SkipNonFiniteSteps",
]
