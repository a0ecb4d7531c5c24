"""Published methods, one file each. Nothing heavy is imported until the configuration of one is asked for."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..help import did_you_mean


if TYPE_CHECKING:
    from ..trainer.config import SelfDistillationConfig

# By the name of the command: the module below this one, and the configuration in it
METHODS = {
    "opsd": "opsd.OPSDConfig",
    "purified_opsd": "purified_opsd.PurifiedOPSDConfig",
    "opsdc": "opsdc.OPSDCConfig",
    "pbsd": "pbsd.PBSDConfig",
    "brts": "brts.BRTSConfig",
    "vpd": "vpd.VPDConfig",
    "atmanrl": "atmanrl.AtManRLConfig",
    "sdft": "sdft.SDFTConfig",
    "sdpo": "sdpo.SDPOConfig",
    "sc_sdpo": "sc_sdpo.SCSDPOConfig",
    "ssopd": "ssopd.SSOPDConfig",
    "u_opsd": "u_opsd.UOPSDConfig",
    "drift": "drift.DRIFTConfig",
    "drift_code": "drift_code.DRIFTCodeConfig",
    "cipo": "cipo.CIPOConfig",
    "sort": "sort.SORTConfig",
    "mopd": "mopd.MOPDConfig",
    "correct_only": "correct_only.CorrectOnlyConfig",
    "rlsd": "rlsd.RLSDConfig",
    "rlrt": "rlrt.RLRTConfig",
    "rlcsd": "rlcsd.RLCSDConfig",
    "trace": "trace.TRACEConfig",
    "resd": "resd.RESDConfig",
    "dasd": "dasd.DASDConfig",
    "antisd": "antisd.AntiSDConfig",
    "antisd_code": "antisd_code.AntiSDCodeConfig",
    "egrsd": "egrsd.EGRSDConfig",
    "cl_egrsd": "cl_egrsd.CLEGRSDConfig",
    "msd": "msd.MSDConfig",
    "sdpg": "sdpg.SDPGConfig",
    "rethinking_opd": "rethinking_opd.RethinkingOPDConfig",
    "rethinking_opd_code": "rethinking_opd_code.RethinkingOPDCodeConfig",
    "stable_opd": "stable_opd.StableOPDConfig",
    "vopd": "vopd.VOPDConfig",
    "star": "star.STaRConfig",
}

# What can be trained: a method, or what its user makes of the parts
TRAINABLE = {name: f"{__name__}.{place}" for name, place in METHODS.items()}
TRAINABLE["distill"] = "trl_opsd.trainer.config.SelfDistillationConfig"


def config_class(name: str) -> "type[SelfDistillationConfig]":
    """
    The configuration that a training command starts from.

    Args:
        name (`str`):
            Key of `TRAINABLE`.

    Returns:
        `type[SelfDistillationConfig]`:
            Class whose defaults are the method.

    Raises:
        ValueError: If there is no such method, naming the one that comes closest.
    """
    if name not in TRAINABLE:
        raise ValueError(f"Unknown method: `{name}`. {did_you_mean(name, TRAINABLE)}")
    module, _, class_name = TRAINABLE[name].rpartition(".")
    return getattr(import_module(module), class_name)


def method_of_recipe(path: str | Path) -> str:
    """
    The training command that a recipe is for, by its folder, or else by its own name.

    Args:
        path (`str` or `Path`):
            The recipe.

    Returns:
        `str`:
            Key of `TRAINABLE`.

    Raises:
        ValueError: If neither is one, or there is no such file.
    """
    file = Path(path).resolve()
    for name in (file.parent.name, file.stem):
        if name in TRAINABLE:
            return name
    if not file.is_file():
        raise ValueError(f"`--config {path}` is no file.")
    raise ValueError(
        f"Neither the folder nor the name of `--config {path}` is a training command. Name it by `--method`, one of: "
        f"{', '.join(TRAINABLE)}."
    )


def summary(name: str) -> str:
    """
    What a training command does. Its method is read, not imported.

    Args:
        name (`str`):
            Key of `TRAINABLE`.

    Returns:
        `str`:
            First line of the docstring of its configuration.
    """
    module, _, class_name = TRAINABLE[name].rpartition(".")
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    [config] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    return (ast.get_docstring(config) or "").partition("\n")[0]
