"""Whose weights read the privileged prompt: the policy's own, a copy of them, another model's or a server's."""

from .base import Read, Teacher, TokenTargets
from .copied import EMA, CopiedTeacher, Never, Periodic, UpdateRule
from .external import ExternalTeacher, check_external_teacher
from .fingerprint import fingerprint
from .make import make_teacher
from .served import ServedTeacher
from .several import NUMBER, SeveralTeachers
from .shared import BaseModelTeacher, LiveTeacher


__all__ = [
    "EMA",
    "NUMBER",
    "BaseModelTeacher",
    "CopiedTeacher",
    "ExternalTeacher",
    "LiveTeacher",
    "Never",
    "Periodic",
    "Read",
    "ServedTeacher",
    "SeveralTeachers",
    "Teacher",
    "TokenTargets",
    "UpdateRule",
    "check_external_teacher",
    "fingerprint",
    "make_teacher",
]
