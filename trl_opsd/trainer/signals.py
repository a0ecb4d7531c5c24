"""From the configuration to the parts that write the loss's streams."""

from typing import Any, cast

from ..parts import make_part
from ..signal import (
    ADVANTAGES,
    COEFFICIENTS,
    SCHEDULES,
    TOKEN_WEIGHTS,
    Advantage,
    PolicyWeighting,
    Schedule,
    Signals,
    TokenWeighting,
)
from .config import SelfDistillationConfig


def make_signals(args: SelfDistillationConfig) -> Signals:
    """
    The parts that a configuration names.

    Raises:
        ValueError: If there is no such part, if its arguments do not fit, or if it is none of its slot.
    """
    advantage = make_part("advantage", args.advantage, cast(Any, args.advantage_kwargs), ADVANTAGES)
    _check_kind("advantage", advantage, (Advantage,))
    weightings = {
        name: make_part("token_weights", name, kwargs, TOKEN_WEIGHTS)
        for name, kwargs in cast(dict[str, Any], args.token_weights or {}).items()
    }
    for weighting in weightings.values():
        _check_kind("token_weights", weighting, (TokenWeighting, PolicyWeighting))
    schedules = {}
    for name, given in cast(dict[str, Any], args.schedules or {}).items():
        kwargs = {"kind": "linear", **given}
        schedules[name] = make_part(f"schedules[{name!r}]", kwargs.pop("kind"), kwargs, SCHEDULES)
        _check_kind("schedules", schedules[name], (Schedule,))
    return Signals({name: getattr(args, name) for name in COEFFICIENTS}, advantage, weightings, schedules)


def _check_kind(slot: str, part: Any, bases: tuple[type, ...]) -> None:
    if not isinstance(part, bases):
        names = " or ".join(base.__name__ for base in bases)
        raise ValueError(f"`{slot}` names {type(part).__name__}, which is no subclass of {names}.")
