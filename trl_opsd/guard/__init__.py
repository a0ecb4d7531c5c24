"""Callbacks that watch a run."""

from .base import ACTIONS, Guard, MetricGuard, Relative, Rising
from .guards import GUARDS
from .non_finite import SkipNonFiniteSteps
from .watch import Guards


__all__ = ["ACTIONS", "GUARDS", "Guard", "Guards", "MetricGuard", "Relative", "Rising", "SkipNonFiniteSteps"]
