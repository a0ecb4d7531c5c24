"""What can work with the processes that are there, their sharding and their precision."""

import os
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from ...data import image_columns, image_parts, prompt_of, teacher_images_of, undecoded
from ..config import SelfDistillationConfig
from ..several import each_teacher, naming


def check_world(
    args: SelfDistillationConfig, accelerator: Accelerator, policy: PreTrainedModel | PeftModel, *datasets: Any
) -> None:
    """
    Refuse processes that are not those asked for, and sharding or precision that the teacher, or images in the data,
    do not work with.

    Raises:
        ValueError: Naming the setting and the way out.
    """
    _check_launch(accelerator)
    for name, its in each_teacher(args).items():
        with naming(name):
            _check_teacher(its, accelerator, trains_all=not isinstance(policy, PeftModel))
    for data in datasets:
        _check_images_everywhere(accelerator, data)


def _check_images_everywhere(accelerator: Accelerator, datasets: Any) -> None:
    """
    Refuse rows without images beside rows with some under DeepSpeed and FSDP2: a process whose rows have none does not
    run the layers that read them, and the others would wait for its part of their weights or gradients.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The processes.
        datasets ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Rows. Those of a stream are not checked.

    Raises:
        ValueError: Naming a row with images and one without.
    """
    if accelerator.num_processes == 1 or not (getattr(accelerator.state, "fsdp_plugin", None) or _zero(accelerator)):
        return
    for data in datasets.values() if isinstance(datasets, dict) else [datasets]:
        if not isinstance(data, Dataset) or not image_columns(data):
            continue
        student: dict[bool, int] = {}
        teacher: dict[bool, int] = {}
        for index, row in enumerate(undecoded(data)):
            prompt = prompt_of(row)
            has_any = not isinstance(prompt, str) and bool(image_parts(prompt))
            student.setdefault(has_any, index)
            teacher.setdefault(has_any or bool(teacher_images_of(row)), index)
        for who, rows in {"student": student, "teacher": teacher}.items():
            if len(rows) == 2:
                raise ValueError(
                    f"The {who} reads images in row {rows[True]} of the data and none in row {rows[False]}. On "
                    "several processes with DeepSpeed or FSDP2, all rows must have one, or none. Give the others an "
                    "image, leave them out, or train with DDP."
                )


def _check_teacher(args: SelfDistillationConfig, accelerator: Accelerator, trains_all: bool) -> None:
    is_updated = args.teacher in ("periodic", "ema")
    if is_updated:
        _check_updated_teacher(args, accelerator, trains_all)
    if args.teacher_offload:
        _check_offload(args, accelerator, trains_all)
    on_nvme = (_zero(accelerator).get("offload_param") or {}).get("device") == "nvme"
    if on_nvme and (is_updated or (trains_all and args.teacher == "initial")):
        raise ValueError(
            f"`teacher='{args.teacher}'` cannot be copied from weights that ZeRO-3 keeps on NVMe. Set "
            "`offload_param_device: cpu` in the accelerate configuration, or `teacher='live'`."
        )


def _zero(accelerator: Accelerator) -> dict[str, Any]:
    deepspeed = accelerator.state.deepspeed_plugin
    return {} if deepspeed is None else deepspeed.deepspeed_config["zero_optimization"]


def _check_launch(accelerator: Accelerator) -> None:
    # What `accelerate launch` leaves in the environment of a process it took for one of several
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    worlds = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    if is_launched and not any(name in os.environ for name in worlds):
        raise ValueError(
            "`accelerate launch` was asked for several processes (`num_processes`) and started one: on the CPU, it "
            "starts several with DeepSpeed or `mpirun_hostfile` only. Start them with `torchrun --nproc_per_node`, or "
            "set `num_processes: 1`. (If one is what you asked for, unset `MASTER_ADDR`.)"
        )
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ValueError("FSDP1 is not supported. Set `fsdp_version: 2` in the accelerate configuration.")
    if fsdp is None and os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        raise ValueError(
            f"The accelerate configuration asks for FSDP, but accelerate runs "
            f"`{accelerator.state.distributed_type.value}` on {accelerator.num_processes} processes, where nothing "
            "would be sharded: FSDP needs GPUs. Without any, set `distributed_type: DEEPSPEED`, or leave it out."
        )


def _check_updated_teacher(args: SelfDistillationConfig, accelerator: Accelerator, trains_all: bool) -> None:
    if accelerator.mixed_precision == "fp8":
        raise ValueError(
            f"`teacher='{args.teacher}'` follows the policy's weights, which `mixed_precision: fp8` may keep as 8-bit "
            "numbers with scales of their own. Set `mixed_precision: bf16` in the accelerate configuration, or choose "
            "another `teacher`."
        )
    if _zero(accelerator).get("zero_quantized_nontrainable_weights"):
        raise ValueError(
            "With `zero_quantized_nontrainable_weights: true`, ZeRO-3 keeps weights that no gradient trains, those of "
            f"`teacher='{args.teacher}'` among them, as 8-bit numbers. Set it to `false` in the DeepSpeed "
            "configuration."
        )
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if trains_all and fsdp is not None and not fsdp.reshard_after_forward:
        raise ValueError(
            f"With `fsdp_reshard_after_forward: false`, a copy for `teacher='{args.teacher}'` stays whole after it "
            "has run, and could not follow a sharded policy. Set it to `true` in the accelerate configuration, or "
            "train a LoRA adapter."
        )


def _check_offload(args: SelfDistillationConfig, accelerator: Accelerator, trains_all: bool) -> None:
    state = accelerator.state
    if getattr(state, "fsdp_plugin", None) is not None or state.deepspeed_plugin is not None:
        raise ValueError(
            "`teacher_offload=True` works with a single process or DDP: DeepSpeed and FSDP2 manage the teacher's "
            "weights themselves. Set it to `False`, and have them offload both models' parameters in the "
            "accelerate configuration (`offload_param_device: cpu` with ZeRO-3, `fsdp_offload_params: true`)."
        )
    if not trains_all and args.teacher != "external":
        raise ValueError(
            f"`teacher_offload=True` has no effect on `teacher='{args.teacher}'` of a LoRA adapter, which shares "
            "the policy's base weights. Set it to `False`."
        )
