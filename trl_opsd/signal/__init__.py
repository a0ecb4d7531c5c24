"""From rewards and scores to factors per token: what a method writes, and the loss executes."""

from .advantage import ADVANTAGES, Advantage
from .batch import Batch, TokenScores
from .curriculum import CURRICULA, Curriculum
from .pass_rates import PassRates
from .schedule import SCHEDULES, Schedule
from .streams import COEFFICIENTS, Signals
from .target import Target
from .weighting import TERMS, TOKEN_WEIGHTS, PolicyWeighting, TeacherWeighting, TokenWeighting


__all__ = [
    "ADVANTAGES",
    "COEFFICIENTS",
    "CURRICULA",
    "SCHEDULES",
    "TERMS",
    "TOKEN_WEIGHTS",
    "Advantage",
    "Batch",
    "Curriculum",
    "PassRates",
    "PolicyWeighting",
    "Schedule",
    "Signals",
    "Target",
    "TeacherWeighting",
    "TokenScores",
    "TokenWeighting",
]
