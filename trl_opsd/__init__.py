"""On-policy self-distillation on top of TRL's [`~trl.GRPOTrainer`]."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl_opsd.trainer.config import SelfDistillationConfig
    from trl_opsd.trainer.opsd_config import OPSDConfig
    from trl_opsd.trainer.opsd_trainer import OPSDTrainer
    from trl_opsd.trainer.opsdc_config import OPSDCConfig
    from trl_opsd.trainer.opsdc_trainer import OPSDCTrainer
    from trl_opsd.trainer.trainer import SelfDistillationTrainer

    __version__: str

__all__ = [
    "OPSDCConfig",
    "OPSDCTrainer",
    "OPSDConfig",
    "OPSDTrainer",
    "SelfDistillationConfig",
    "SelfDistillationTrainer",
    "__version__",
]

# Importing torch takes seconds, which `trl-opsd --help` must not cost: a name is imported when it is first asked for.
_MODULES = {
    "OPSDCConfig": "trl_opsd.trainer.opsdc_config",
    "OPSDCTrainer": "trl_opsd.trainer.opsdc_trainer",
    "OPSDConfig": "trl_opsd.trainer.opsd_config",
    "OPSDTrainer": "trl_opsd.trainer.opsd_trainer",
    "SelfDistillationConfig": "trl_opsd.trainer.config",
    "SelfDistillationTrainer": "trl_opsd.trainer.trainer",
}


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
