"""Callbacks that watch a run."""

from .non_finite import SkipNonFiniteSteps


__all__ = ["SkipNonFiniteSteps"]
