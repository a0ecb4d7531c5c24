"""The teacher's weights in a checkpoint: one safetensors file with whole values, whatever they are sharded over."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .sharding import shard_like, whole_value


_FILE = "teacher.safetensors"


def save_parts(
    directory: Path, parts: Iterable[tuple[str, nn.Parameter, torch.Tensor]], is_main_process: bool
) -> None:
    """Write values given as name, parameter they are sharded like, and this process's part. Every process has to."""
    values = {}
    for name, parameter, part in parts:
        value = whole_value(parameter, part)
        if is_main_process:
            values[name] = value.contiguous()
    if is_main_process:
        save_file(values, directory / _FILE)


def load_parts(directory: Path, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
    """
    This process's parts of what [`save_parts`] wrote, in the order of `parameters`. Every process has to.

    Raises:
        ValueError: If the checkpoint has no such file, or one of other weights.
    """
    file = directory / _FILE
    if not file.exists():
        raise ValueError(
            f"{directory} holds no {_FILE}, so its run had no teacher with weights of its own. Resume from another "
            "checkpoint, or set the `teacher` this one was written with."
        )
    values = load_file(file)
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    expected = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in parameters.items()}
    if shapes != expected:
        different = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
        raise ValueError(
            f"{file} holds other weights than this teacher's: {different[0]!r} has the shape "
            f"{shapes.get(different[0])} there and {expected.get(different[0])} here ({len(different)} differ in "
            "all; None: missing). Resume with the model and the adapter settings it was written with."
        )
    for name, parameter in parameters.items():
        yield name, shard_like(parameter, values[name])
