"""From rewards and scores to factors per token: what a method writes, and the loss executes."""

from .advantage import ADVANTAGES, Advantage
from .batch import Batch, TokenScores
from .schedule import SCHEDULES, Schedule
from .streams import COEFFICIENTS, Signals
from .weighting import TERMS, TOKEN_WEIGHTS, PolicyWeighting, TokenWeighting


__all__ = [
    "ADVANTAGES",
    "COEFFICIENTS",
    "SCHEDULES",
    "TERMS",
    "TOKEN_WEIGHTS",
    "Advantage",
    "Batch",
    "PolicyWeighting",
    "Schedule",
    "Signals",
    "TokenScores",
    "TokenWeighting",
]
