"""Whose weights read the privileged prompt: one small class per kind of teacher."""

from .base import Teacher
from .ema import EMATeacher
from .external import ExternalTeacher
from .fingerprint import fingerprint
from .initial import InitialTeacher
from .live import LiveTeacher
from .offload import offload
from .periodic import PeriodicTeacher
from .served import ServedTeacher


__all__ = [
    "EMATeacher",
    "ExternalTeacher",
    "InitialTeacher",
    "LiveTeacher",
    "PeriodicTeacher",
    "ServedTeacher",
    "Teacher",
    "fingerprint",
    "offload",
]
