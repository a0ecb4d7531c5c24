"""From the configuration to the teacher: what can work with these processes, and what is loaded, copied or sharded."""

import os
from typing import Any, cast

from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import create_model_from_path

from ..teacher import (
    EMATeacher,
    ExternalTeacher,
    InitialTeacher,
    LiveTeacher,
    PeriodicTeacher,
    Teacher,
    fingerprint,
    offload,
)
from ..teacher.copies import NoSecondAdapterError
from .config import SelfDistillationConfig


def check_world(args: SelfDistillationConfig, accelerator: Accelerator, policy: PreTrainedModel | PeftModel) -> None:
    """
    Refuse processes that are not those asked for, and sharding or precision that the teacher does not work with.

    Raises:
        ValueError: Naming the setting and the way out.
    """
    state = accelerator.state
    # What `accelerate launch` leaves in the environment of a process it took for one of several
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    worlds = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    if is_launched and not any(name in os.environ for name in worlds):
        raise ValueError(
            "`accelerate launch` was asked for several processes (`num_processes`) and started one: on the CPU, it "
            "starts several with DeepSpeed or `mpirun_hostfile` only. Start them with `torchrun --nproc_per_node`, or "
            "set `num_processes: 1`. (If one is what you asked for, unset `MASTER_ADDR`.)"
        )
    fsdp, deepspeed = getattr(state, "fsdp_plugin", None), state.deepspeed_plugin
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ValueError("FSDP1 is not supported. Set `fsdp_version: 2` in the accelerate configuration.")
    if fsdp is None and os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        raise ValueError(
            f"The accelerate configuration asks for FSDP, but accelerate runs `{state.distributed_type.value}` on "
            f"{accelerator.num_processes} processes, where nothing would be sharded: FSDP needs GPUs. Without any, "
            "set `distributed_type: DEEPSPEED`, or leave it out."
        )
    is_updated = args.teacher in ("periodic", "ema")
    if is_updated and accelerator.mixed_precision == "fp8":
        raise ValueError(
            f"`teacher='{args.teacher}'` follows the policy's weights, which `mixed_precision: fp8` may keep as 8-bit "
            "numbers with scales of their own. Set `mixed_precision: bf16` in the accelerate configuration, or choose "
            "another `teacher`."
        )
    trains_all = not isinstance(policy, PeftModel)
    if args.teacher_offload:
        if fsdp is not None or deepspeed is not None:
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
    zero = {} if deepspeed is None else deepspeed.deepspeed_config["zero_optimization"]
    on_nvme = (zero.get("offload_param") or {}).get("device") == "nvme"
    if on_nvme and (is_updated or (trains_all and args.teacher == "initial")):
        raise ValueError(
            f"`teacher='{args.teacher}'` cannot be copied from weights that ZeRO-3 keeps on NVMe. Set "
            "`offload_param_device: cpu` in the accelerate configuration, or `teacher='live'`."
        )
    if is_updated and zero.get("zero_quantized_nontrainable_weights"):
        raise ValueError(
            "With `zero_quantized_nontrainable_weights: true`, ZeRO-3 keeps weights that no gradient trains, those of "
            f"`teacher='{args.teacher}'` among them, as 8-bit numbers. Set it to `false` in the DeepSpeed "
            "configuration."
        )
    if is_updated and trains_all and fsdp is not None and not fsdp.reshard_after_forward:
        raise ValueError(
            f"With `fsdp_reshard_after_forward: false`, a copy for `teacher='{args.teacher}'` stays whole after it "
            "has run, and could not follow a sharded policy. Set it to `true` in the accelerate configuration, or "
            "train a LoRA adapter."
        )


def check_external_teacher(
    args: SelfDistillationConfig, tokenizer: PreTrainedTokenizerBase, model_config: Any
) -> None:
    """
    Refuse an external teacher over other tokens than the policy's, before any model is loaded.

    Raises:
        ValueError: Naming the first difference.
    """
    path = cast(str, args.teacher_model_name_or_path)
    names = ("revision", "trust_remote_code", "subfolder", "token", "cache_dir")
    kwargs = {name: value for name, value in _external_kwargs(args).items() if name in names}
    # Other token ids would not even raise an error: the teacher would score another text
    ours, theirs = tokenizer.get_vocab(), AutoTokenizer.from_pretrained(path, **kwargs).get_vocab()
    if ours != theirs:
        different = min(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
        raise ValueError(
            f"`teacher_model_name_or_path='{path}'` has another vocabulary than the policy: {different!r} is token "
            f"{theirs.get(different)} there and {ours.get(different)} here. Choose a teacher with the policy's "
            "tokenizer."
        )
    configs = (model_config, AutoConfig.from_pretrained(path, **kwargs))
    size, teacher_size = (config.get_text_config().vocab_size for config in configs)
    if size != teacher_size:
        raise ValueError(
            f"`teacher_model_name_or_path='{path}'` has logits over {teacher_size} tokens and the policy over "
            f"{size}, although their tokenizers agree. Resize one of them with "
            f"`model.resize_token_embeddings({max(size, teacher_size)})` and save it."
        )


def make_teacher(
    args: SelfDistillationConfig,
    accelerator: Accelerator,
    policy: PreTrainedModel | PeftModel,
    adapter_starts_at_zero: bool,
) -> tuple[Teacher, str | None]:
    """
    The teacher of a configuration.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration.
        accelerator ([`~accelerate.Accelerator`]):
            The processes, which share a copy's weights as they do the policy's.
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, not yet wrapped.
        adapter_starts_at_zero (`bool`):
            See [`InitialTeacher`].

    Returns:
        `tuple[Teacher, str | None]`: the teacher, and the fingerprint of an external one.

    Raises:
        ValueError: If these processes cannot hold it, or training would change it unasked.
    """
    if isinstance(policy, PeftModel) and args.teacher not in ("live", "external"):
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad and policy.peft_config.keys().isdisjoint(name.split(".")):
                raise ValueError(
                    f"`teacher='{args.teacher}'` shares the base model with the policy, and training would change it: "
                    f'{name!r} is trained and belongs to no adapter. Set `bias="none"` in the adapter\'s '
                    "configuration, freeze what else is trained of the base, or set `teacher='live'`."
                )
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)

    def shard(copy: nn.Module) -> nn.Module:
        if args.teacher_offload:
            return offload(copy, policy.device)
        if accelerator.state.deepspeed_plugin is not None:
            return prepare_deepspeed(copy, accelerator)
        if fsdp is not None:
            if fsdp.cpu_ram_efficient_loading:
                raise ValueError(
                    "With `fsdp_cpu_ram_efficient_loading: true` only the first process holds weights when the model "
                    f"for `teacher='{args.teacher}'` is made. Set it to `false` in the accelerate configuration, as "
                    "recipes/accelerate/fsdp2.yaml does."
                )
            # Each layer by itself, as accelerate wraps the policy, or every pass would gather the whole model at once
            layers = getattr(copy, "_no_split_modules", None) or ()
            for module in reversed(list(copy.modules())):
                if type(module).__name__ in layers:
                    prepare_fsdp(module, accelerator)
            return prepare_fsdp(copy, accelerator)
        return accelerator.prepare_model(copy, evaluation_mode=True)

    try:
        if args.teacher == "initial":
            return InitialTeacher(policy, adapter_starts_at_zero, shard), None
        if args.teacher == "periodic":
            return PeriodicTeacher(policy, cast(int, args.teacher_update_steps), shard), None
        if args.teacher == "ema":
            return EMATeacher(policy, cast(float, args.teacher_update_rate), shard), None
    except NoSecondAdapterError as error:
        raise ValueError(f"`teacher='{args.teacher}'` {error} Train with LoRA, or set `teacher='live'`.") from error
    if args.teacher == "external":
        model = _load_external_teacher(args, is_sharded=fsdp is not None or is_deepspeed_zero3_enabled())
        external_fingerprint = fingerprint(model)
        return ExternalTeacher(model, shard), external_fingerprint
    return LiveTeacher(), None


def _load_external_teacher(args: SelfDistillationConfig, is_sharded: bool) -> PreTrainedModel:
    # An automatic device map would put parts of it where the policy is not
    kwargs = {"device_map": None, **_external_kwargs(args)}
    model = create_model_from_path(cast(str, args.teacher_model_name_or_path), **kwargs)
    if getattr(model, "is_quantized", False) and (is_sharded or args.teacher_offload):
        raise ValueError(
            "A quantised teacher can neither be sharded by ZeRO-3 or FSDP2 nor offloaded. Train with DDP or ZeRO-2 "
            "and `teacher_offload=False`, or drop `quantization_config` from `teacher_model_init_kwargs`."
        )
    return model


def _external_kwargs(args: SelfDistillationConfig) -> dict[str, Any]:
    kwargs = cast(dict[str, Any], args.teacher_model_init_kwargs or {})
    return {"trust_remote_code": args.trust_remote_code, **kwargs}
