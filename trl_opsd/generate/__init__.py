"""Data sets made offline, for TRL's SFT and DPO trainers."""

from collections.abc import Mapping
from typing import Any, cast

from ..parts import make_part
from .base import Attempt, Made, Maker, Problems, Writer
from .mixsd import MixSDMaker
from .pbsd import PBSDMaker
from .rollouts import RolloutsMaker
from .star import STaRMaker
from .tessy import TESSYMaker


__all__ = [
    "MAKERS",
    "Attempt",
    "Made",
    "Maker",
    "MixSDMaker",
    "PBSDMaker",
    "Problems",
    "RolloutsMaker",
    "STaRMaker",
    "TESSYMaker",
    "Writer",
    "make_maker",
]

MAKERS: dict[str, type | str] = {
    "rollouts": RolloutsMaker,
    "star": STaRMaker,
    "mixsd": MixSDMaker,
    "pbsd": PBSDMaker,
    "tessy": TESSYMaker,
}


def make_maker(name: str, kwargs: Mapping[str, Any] | None = None) -> Maker:
    """
    Construct a maker.

    Args:
        name (`str`):
            One of `MAKERS`, or the import path of a class that implements [`Maker`].
        kwargs (`Mapping[str, Any]`, *optional*):
            Keyword arguments of the class.

    Raises:
        ValueError: If there is no such maker, or its class does not take `kwargs`.
    """
    maker = make_part("maker", name, kwargs, MAKERS)
    if not callable(maker) or not all(hasattr(maker, name) for name in ("needs_rewards", "needs_context")):
        raise ValueError(
            f"`maker={name!r}` is no maker: it needs the attributes `needs_rewards` and `needs_context`, and a method "
            "`__call__(problems)`."
        )
    return cast(Maker, maker)
