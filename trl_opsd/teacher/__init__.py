"""Whose weights read the privileged prompt: one small class per kind of teacher."""

from .base import Teacher
from .initial import InitialTeacher
from .live import LiveTeacher
from .periodic import PeriodicTeacher


__all__ = ["InitialTeacher", "LiveTeacher", "PeriodicTeacher", "Teacher"]
