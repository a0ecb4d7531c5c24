"""The settings of each teacher, where a run has several."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast


if TYPE_CHECKING:
    from .config import SelfDistillationConfig

# What is said of one teacher, and what it has to be
FIELDS: dict[str, type | tuple[type, ...]] = {
    "teacher": str,
    "teacher_update_steps": int,
    "teacher_update_rate": (int, float),
    "teacher_model_name_or_path": str,
    "teacher_model_init_kwargs": dict,
    "teacher_offload": bool,
    "teacher_server_base_url": str,
}


def complete_teacher(args: "SelfDistillationConfig") -> None:
    """Put in what the fields of a kind stand for where they are unset."""
    if args.teacher == "periodic" and args.teacher_update_steps is None:
        args.teacher_update_steps = 50
    if args.teacher == "ema" and args.teacher_update_rate is None:
        args.teacher_update_rate = 0.05
    if args.teacher == "several" and args.teacher_column is None:
        args.teacher_column = "teacher"


def each_teacher(args: "SelfDistillationConfig") -> dict[str | None, "SelfDistillationConfig"]:
    """
    The configuration as it would be with each of the teachers alone, by its name. That of a single one has the name
    `None`.
    """
    if args.teacher != "several":
        return {None: args}
    assert isinstance(args.teachers, dict)
    each: dict[str | None, SelfDistillationConfig] = {}
    for name, given in args.teachers.items():
        its = each[name] = copy.copy(args)
        its.teachers = its.teacher_column = None
        for field in FIELDS:
            setattr(its, field, given.get(field, False if field == "teacher_offload" else None))
        its.teacher_server_base_url = its.teacher_server_base_url and its.teacher_server_base_url.rstrip("/")
        complete_teacher(its)
    return each


def has_served_teacher(args: "SelfDistillationConfig") -> bool:
    """Whether a teacher is on a server."""
    return any(its.teacher_server_base_url is not None for its in each_teacher(args).values())


def teacher_names(args: "SelfDistillationConfig") -> dict[str, list[str]]:
    """The column in which rows name one of several teachers, and the names."""
    return {cast(str, args.teacher_column): list(args.teachers)} if args.teacher == "several" and args.teachers else {}


@contextmanager
def naming(name: str | None) -> Iterator[None]:
    """Inside, what is refused of one of several teachers is said to be of it."""
    try:
        yield
    except ValueError as error:
        if name is None:
            raise
        raise ValueError(f"`teachers[{name!r}]`: {error}") from error
