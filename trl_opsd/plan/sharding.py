"""How the processes share weights, gradients and optimizer state, as `accelerate launch` is told."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..help import listed


KINDS = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")


class Sharding(NamedTuple):
    """
    What of a model each process holds.

    Args:
        kind (`str`):
            One of `KINDS`.
        offloads_optimizer (`bool`, *optional*, defaults to `False`):
            Whether the optimizer's state is in CPU memory.
        offloads_weights (`bool`, *optional*, defaults to `False`):
            Whether the weights are, as far as no layer needs them.
        mixed_precision (`str`, *optional*, defaults to `"no"`):
            That of accelerate's configuration, which the trainer's `bf16` and `fp16` come before.
    """

    kind: str
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    mixed_precision: str = "no"

    @property
    def stage(self) -> int:
        """ZeRO's stage, 0 without DeepSpeed."""
        return int(self.kind[-1]) if self.kind.startswith("zero") else 0

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds a part of every weight."""
        return self.kind in ("zero3", "fsdp2")

    @property
    def shards_gradients(self) -> bool:
        """Whether each process keeps a part of every gradient."""
        return self.kind in ("zero2", "zero3", "fsdp2")

    @property
    def shards_optimizer(self) -> bool:
        """Whether each process holds the optimizer's state of a part."""
        return self.stage > 0 or self.kind == "fsdp2"


def named(kind: str, num_gpus: int) -> Sharding:
    """
    Sharding by its name.

    Raises:
        ValueError: If there is none of that name, or it does not go with the number of GPUs.
    """
    if kind not in KINDS:
        raise ValueError(f"`--sharding {kind}` is none of {listed(KINDS)}.")
    if kind == "single" and num_gpus > 1:
        raise ValueError(f"`--sharding single` is one process, and `--gpus` names {num_gpus}. Set `--sharding ddp`.")
    return Sharding(kind)


def read_accelerate_config(path: Path) -> Sharding:
    """
    Sharding that an accelerate configuration asks for.

    Args:
        path (`Path`):
            YAML file, as for `accelerate launch --config_file`.

    Raises:
        ValueError: If it asks for something that the trainer does not work with.
    """
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    distributed = str(values.get("distributed_type") or "NO").upper()
    precision = str(values.get("mixed_precision") or "no")
    if distributed in ("NO", "MULTI_CPU", "MULTI_GPU"):
        return Sharding("single" if distributed == "NO" else "ddp", mixed_precision=precision)
    if distributed == "DEEPSPEED":
        deepspeed = values.get("deepspeed_config") or {}
        if "deepspeed_config_file" in deepspeed:
            raise ValueError(
                f"{path} leaves ZeRO's settings to {deepspeed['deepspeed_config_file']}, which is not read here. Give "
                "its stage as `--sharding zero2` or zero3."
            )
        optimizer, weights = (
            deepspeed.get(f"offload_{what}_device", "none") != "none" for what in ("optimizer", "param")
        )
        stage = int(deepspeed.get("zero_stage", 2))
        return Sharding(f"zero{stage}" if stage else "ddp", optimizer, weights, precision)
    fsdp = values.get("fsdp_config") or {}
    if distributed == "FSDP" and int(fsdp.get("fsdp_version", 1)) == 2:
        offloads_all = bool(fsdp.get("fsdp_offload_params", False))
        return Sharding("fsdp2", offloads_all, offloads_all, precision)
    raise ValueError(f"{path} asks for `distributed_type: {distributed}`, which is none of {listed(KINDS)}.")
