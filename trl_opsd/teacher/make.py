"""From the settings to the teacher: what is loaded, copied or sharded."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import create_model_from_path

from .base import Teacher
from .copied import EMA, CopiedTeacher, Never, Periodic, UpdateRule
from .copies import ADAPTER_NAME, NoSecondAdapterError
from .external import ExternalTeacher
from .offload import offload
from .shared import BaseModelTeacher, LiveTeacher


def make_teacher(
    kind: str,
    accelerator: Accelerator,
    policy: PreTrainedModel | PeftModel,
    *,
    adapter_starts_at_zero: bool = False,
    update_steps: int = 50,
    update_rate: float = 0.05,
    model_name_or_path: str | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    offloads: bool = False,
    name: str | None = None,
) -> Teacher:
    """
    A teacher whose weights are here.

    Args:
        kind (`str`):
            `"initial"`, `"live"`, `"periodic"`, `"ema"` or `"external"`.
        accelerator ([`~accelerate.Accelerator`]):
            The processes, which share a copy's weights as they do the policy's.
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, not yet wrapped.
        adapter_starts_at_zero (`bool`, *optional*, defaults to `False`):
            Whether the policy's adapter changes nothing yet, so that switching it off is the initial policy and no
            copy is needed.
        update_steps (`int`, *optional*, defaults to `50`):
            Optimizer steps between two refreshes of a periodic teacher.
        update_rate (`float`, *optional*, defaults to `0.05`):
            Share of the policy in each update of a moving average.
        model_name_or_path (`str`, *optional*):
            Model of an external teacher.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            What it is loaded with.
        offloads (`bool`, *optional*, defaults to `False`):
            Whether the weights of a teacher that is a whole model stay in CPU memory.
        name (`str`, *optional*):
            Tells it from others of the same policy.

    Raises:
        ValueError: If these processes cannot hold it, or training would change it unasked.
    """

    def shard(model: nn.Module) -> nn.Module:
        return offload(model, policy.device) if offloads else _shard(model, accelerator, kind)

    if kind == "live":
        return LiveTeacher()
    if kind == "external":
        assert model_name_or_path is not None
        is_sharded = getattr(accelerator.state, "fsdp_plugin", None) is not None or is_deepspeed_zero3_enabled()
        model = _load_external(model_name_or_path, model_init_kwargs or {}, whole=not (is_sharded or offloads))
        return ExternalTeacher(model, shard)
    if isinstance(policy, PeftModel):
        _check_base_is_frozen(policy, kind)
        if kind == "initial" and adapter_starts_at_zero:
            return BaseModelTeacher()
    rules: dict[str, Callable[[], UpdateRule]] = {
        "initial": Never,
        "periodic": lambda: Periodic(update_steps),
        "ema": lambda: EMA(update_rate),
    }
    try:
        adapter_name = ADAPTER_NAME if name is None else f"{ADAPTER_NAME}_{name}"
        return CopiedTeacher(policy, rules[kind](), shard, adapter_name)
    except NoSecondAdapterError as error:
        raise ValueError(f"`teacher='{kind}'` {error} Train with LoRA, or set `teacher='live'`.") from error


def _check_base_is_frozen(policy: PeftModel, kind: str) -> None:
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and policy.peft_config.keys().isdisjoint(name.split(".")):
            raise ValueError(
                f"`teacher='{kind}'` shares the base model with the policy, and training would change it: "
                f'{name!r} is trained and belongs to no adapter. Set `bias="none"` in the adapter\'s '
                "configuration, freeze what else is trained of the base, or set `teacher='live'`."
            )


def _shard(model: nn.Module, accelerator: Accelerator, kind: str) -> nn.Module:
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(model, accelerator)
    if fsdp is None:
        return accelerator.prepare_model(model, evaluation_mode=True)
    if fsdp.cpu_ram_efficient_loading:
        raise ValueError(
            "With `fsdp_cpu_ram_efficient_loading: true` only the first process holds weights when the model for "
            f"`teacher='{kind}'` is made. Set it to `false` in the accelerate configuration, as "
            "recipes/accelerate/fsdp2.yaml does."
        )
    # Each layer by itself, as accelerate wraps the policy, or every pass would gather the whole model at once
    layers = getattr(model, "_no_split_modules", None) or ()
    for module in reversed(list(model.modules())):
        if type(module).__name__ in layers:
            prepare_fsdp(module, accelerator)
    return prepare_fsdp(model, accelerator)


def _load_external(path: str, model_init_kwargs: dict[str, Any], whole: bool) -> PreTrainedModel:
    # An automatic device map would put parts of it where the policy is not
    model = create_model_from_path(path, **{"device_map": None, **model_init_kwargs})
    if getattr(model, "is_quantized", False) and not whole:
        raise ValueError(
            "A quantised teacher can neither be sharded by ZeRO-3 or FSDP2 nor offloaded. Train with DDP or ZeRO-2 "
            "and `teacher_offload=False`, or drop `quantization_config` from `teacher_model_init_kwargs`."
        )
    return model
