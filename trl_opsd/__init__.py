"""On-policy self-distillation on top of TRL's [`~trl.GRPOTrainer`]."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trl_opsd.methods import METHODS


if TYPE_CHECKING:
    from trl_opsd.methods.opsd import OPSDConfig, OPSDTrainer
    from trl_opsd.methods.opsdc import OPSDCConfig, OPSDCTrainer
    from trl_opsd.trainer.config import SelfDistillationConfig
    from trl_opsd.trainer.score import score
    from trl_opsd.trainer.trainer import SelfDistillationTrainer

    __version__: str

# Importing torch takes seconds, which `trl-opsd --help` must not cost: a name is imported when it is first asked for.
_MODULES = {
    "OPSDCTrainer": "trl_opsd.methods.opsdc",
    "OPSDTrainer": "trl_opsd.methods.opsd",
    "SelfDistillationConfig": "trl_opsd.trainer.config",
    "SelfDistillationTrainer": "trl_opsd.trainer.trainer",
    "score": "trl_opsd.trainer.score",
}
for _place in METHODS.values():
    _module, _, _name = _place.partition(".")
    _MODULES[_name] = f"trl_opsd.methods.{_module}"

__all__ = [
    "OPSDCConfig",
    "OPSDCTrainer",
    "OPSDConfig",
    "OPSDTrainer",
    "SelfDistillationConfig",
    "SelfDistillationTrainer",
    "__version__",
    "score",
]
__all__ += sorted(set(_MODULES) - set(__all__))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value = version("trl-opsd")
    elif name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
