"""From rewards and scores to factors per token: what a method writes, and the loss executes."""

from .advantage import ADVANTAGES, Advantage
from .batch import Batch, TokenScores
from .schedule import SCHEDULES, Schedule
from .streams import COEFFICIENTS, Signals, policy_weights
from .weighting import TOKEN_WEIGHTS, TokenWeighting


__all__ = [
    "ADVANTAGES",
    "COEFFICIENTS",
    "SCHEDULES",
    "TOKEN_WEIGHTS",
    "Advantage",
    "Batch",
    "Schedule",
    "Signals",
    "TokenScores",
    "TokenWeighting",
    "policy_weights",
]
