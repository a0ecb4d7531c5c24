"""
Checkpoints that are complete, or known not to be.

A process can die at any moment. So a checkpoint's state file says that it is incomplete while the checkpoint is being
written, and is replaced, in one go, by one that lists all files once they are all there.
"""

import copy
import json
import warnings
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.trainer_utils import sort_checkpoints

from ..files import write_whole


STATE_FILE = "self_distillation_state.json"


def begin(directory: Path) -> None:
    """Mark a checkpoint as incomplete, before anything else in it is written."""
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory, {"complete": False})


def finish(directory: Path, state: dict[str, Any]) -> None:
    """
    Mark a checkpoint as complete, after everything else in it has been written.

    Args:
        directory (`Path`):
            The checkpoint.
        state (`dict[str, Any]`):
            What [`read_state`] is to return, as JSON can hold it.
    """
    files = {str(path.relative_to(directory)): path.stat().st_size for path in _files(directory)}
    _write(directory, {"complete": True, **state, "files": files})


def is_complete(directory: Path) -> bool:
    """Whether there is a checkpoint, with all it should have."""
    try:
        read_state(directory)
    except ValueError:
        return False
    return True


def newest_complete(output_dir: str) -> str | None:
    """
    The newest complete checkpoint of a run. A newer one that is incomplete is reported with a warning.

    Args:
        output_dir (`str`):
            Folder of the run.

    Returns:
        `str`, *optional*: folder of the checkpoint, if there is one.
    """
    for checkpoint in reversed(sort_checkpoints(output_dir) if Path(output_dir).is_dir() else []):
        try:
            read_state(Path(checkpoint))
        except ValueError as error:
            warnings.warn(f"A checkpoint is passed over. {error}", stacklevel=2)
        else:
            return checkpoint
    return None


def move_later(output_dir: Path, step: int) -> Path | None:
    """
    Move the checkpoints of later steps where they are not resumed from, nor pushed to the Hub.

    Args:
        output_dir (`Path`):
            Folder of the run.
        step (`int`):
            Step of the newest checkpoint that stays.

    Returns:
        `Path`, *optional*: where they are now, if there were any.
    """
    checkpoints = map(Path, sort_checkpoints(str(output_dir)))
    later = [path for path in checkpoints if int(path.name.rpartition("-")[2]) > step]
    number = 1
    while (aside := output_dir / f"_rolled_back-{number}").exists():
        number += 1
    for path in later:
        aside.mkdir(exist_ok=True)
        path.rename(aside / path.name)
    return aside if later else None


def read_state(directory: Path) -> dict[str, Any]:
    """
    What was handed to [`finish`].

    Args:
        directory (`Path`):
            The checkpoint.

    Returns:
        `dict[str, Any]`: the state.

    Raises:
        ValueError: If there is no such checkpoint, or it is incomplete or not one of this library's trainers.
    """
    if not directory.is_dir():
        raise ValueError(f"The checkpoint {directory} does not exist.")
    file = directory / STATE_FILE
    if not file.exists():
        raise ValueError(
            f"{directory} holds no {STATE_FILE}, so it was not written by one of these trainers. Start from its "
            "weights with `model` instead of resuming."
        )
    state = json.loads(file.read_text())
    if not state.get("complete"):
        raise ValueError(
            f"{directory} is incomplete: its run ended while it was being written. Resume from an earlier one."
        )
    for name, size in state.pop("files").items():
        path = directory / name
        if not path.exists() or path.stat().st_size != size:
            raise ValueError(
                f"{directory} is damaged: {name} "
                f"{f'has {path.stat().st_size} bytes instead of {size}' if path.exists() else 'is missing'}. Resume "
                "from an earlier one."
            )
    return state


def load_weights(directory: Path, model: PreTrainedModel) -> None:
    """
    Load the weights of a checkpoint into a model, as `from_pretrained` reads them: files may hold them under other
    names and in other pieces than the model does, such as a tensor for each expert of a mixture.

    Args:
        directory (`Path`):
            The checkpoint, written by `save_pretrained`.
        model ([`~transformers.PreTrainedModel`]):
            Model, neither wrapped nor sharded. Its parameters keep their dtype and device.

    Raises:
        ValueError: If the checkpoint lacks a weight of the model, or has one that the model lacks or has in another
            shape.
    """
    own = model.state_dict()
    # The widest of the dtypes, in which the values of all others are exact
    dtype = reduce(torch.promote_types, (value.dtype for value in own.values() if value.is_floating_point()))
    loaded, info = type(model).from_pretrained(
        directory,
        config=copy.deepcopy(model.config),
        dtype=dtype,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        output_loading_info=True,
    )
    for what, names in (
        ("lacks", info["missing_keys"]),
        ("has, and the model lacks,", info["unexpected_keys"]),
        ("has in another shape", [name for name, *_ in info["mismatched_keys"]]),
    ):
        if names:
            first = min(names)
            raise ValueError(
                f"{directory} {what} {len(names)} weights of the policy, {first!r} among them, so the run cannot go "
                "on from it. Resume with the model it was written with, or from an earlier checkpoint."
            )
    model.load_state_dict(loaded.state_dict())


def _files(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.rglob("*")) if path.is_file() and not path.name.startswith(STATE_FILE)]


def _write(directory: Path, state: dict[str, Any]) -> None:
    write_whole(directory / STATE_FILE, json.dumps(state))
