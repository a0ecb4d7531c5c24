"""From a setting to what it takes, and to the smallest changes that make it fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from peft import LoraConfig
from transformers.training_args import OptimizerNames

from .memory import GIB, Phase, phases
from .seconds import Duration, durations, sequences_at_once
from .setting import Setting


_ADAPTER = LoraConfig(r=64, lora_alpha=128, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Plan:
    """
    What a run takes.

    Args:
        setting ([`Setting`]):
            The run.
        phases (`list[Phase]`):
            Memory of each GPU by phase of a step.
        durations (`list[Duration]`):
            Time of an optimizer step by phase, none on a CPU.
        problems (`list[str]`):
            What does not fit, beside memory.
    """

    setting: Setting
    phases: list[Phase]
    durations: list[Duration]
    problems: list[str]

    @property
    def largest(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether nothing takes more than there is."""
        return self.largest.total <= self.setting.gpu.memory and not self.problems

    @property
    def seconds(self) -> float:
        """Of an optimizer step."""
        return sum(one.seconds for one in self.durations)


@dataclass(frozen=True)
class Change:
    """
    A change of a setting.

    Args:
        flags (`dict[str, str]`):
            What to set on the command line of the plan, and of training.
        costs (`str`):
            What it takes in return.
        setting ([`Setting`]):
            The run with it.
    """

    flags: dict[str, str]
    costs: str
    setting: Setting


def make_plan(setting: Setting) -> Plan:
    """
    What a run takes.

    Args:
        setting ([`Setting`]):
            The run.
    """
    problems = []
    if setting.args.use_vllm and sequences_at_once(setting) < 1:
        field = "vllm_gpu_memory_utilization" if setting.args.vllm_mode == "colocate" else "--vllm_server_gpus"
        lengths = setting.lengths
        problems.append(
            f"vLLM has no room for one sequence of {lengths.prompt + lengths.completion:,} tokens beside weights of "
            f"{setting.policy.num_parameters * 2 / GIB:.1f} GiB (`{field}`)."
        )
    completion = setting.mean_completion or setting.lengths.completion
    in_the_mean = replace(setting, lengths=setting.lengths._replace(completion=completion))
    return Plan(setting, phases(setting), durations(in_the_mean), problems)


def suggestions(plan: Plan, most: int = 3) -> list[tuple[list[Change], Plan]]:
    """
    The smallest changes after which a run fits: single ones, or else the fewest at a time.

    Args:
        plan ([`Plan`]):
            A run that does not fit.
        most (`int`, *optional*, defaults to `3`):
            How many to find.

    Returns:
        `list[tuple[list[Change], Plan]]`: changes, and the plan with them.
    """
    kinds = [kind for kind in _CHANGES if next(kind(plan.setting), None) is not None]
    return _fitting(plan.setting, kinds, most) or _fitting(plan.setting, [*kinds, _adapter], most)


def _fitting(setting: Setting, kinds: list[Any], most: int) -> list[tuple[list[Change], Plan]]:
    found: list[tuple[list[Change], Plan]] = []
    for number in range(1, len(kinds) + 1):
        for chosen in combinations(kinds, number):
            changed = _first_that_fits(setting, chosen)
            if changed is not None:
                found.append(changed)
            if len(found) == most:
                return found
        if found:
            break
    return found


def _first_that_fits(setting: Setting, kinds: Any, before: tuple[Change, ...] = ()) -> Any:
    """The mildest of each kind with which all together fit; only the last of several is tried in all its degrees."""
    for change in kinds[0](setting):
        if len(kinds) > 1:
            *_, strongest = kinds[0](setting)
            return _first_that_fits(strongest.setting, kinds[1:], (*before, strongest))
        plan = make_plan(change.setting)
        if plan.fits:
            return [*before, change], plan
    return None


def _checkpointing(setting: Setting) -> Iterator[Change]:
    if not setting.args.gradient_checkpointing:
        changed = setting.with_args(gradient_checkpointing=True)
        yield Change({"gradient_checkpointing": "true"}, "a forward pass more", changed)


def _shorter_passes(setting: Setting) -> Iterator[Change]:
    lengths, rows = setting.lengths, setting.rows_per_pass // 2
    row = max(lengths.prompt, lengths.teacher_prompt) + lengths.completion
    args = setting.args
    whole = (
        args.entropy_coef or args.use_adaptive_entropy or ((args.beta or args.policy_loss_coef) and _one_loss(args))
    )
    while rows >= 1:
        if whole:
            factor = -(-args.per_device_train_batch_size // rows)
            if args.per_device_train_batch_size == factor * rows:
                values = {
                    "per_device_train_batch_size": rows,
                    "gradient_accumulation_steps": args.gradient_accumulation_steps * factor,
                }
                changed = setting.with_args(**values, steps_per_generation=args.steps_per_generation * factor)
                yield Change({name: str(value) for name, value in values.items()}, "more passes", changed)
        else:
            changed = setting.with_args(max_tokens_per_microbatch=rows * row)
            yield Change({"max_tokens_per_microbatch": str(rows * row)}, "more passes", changed)
        rows //= 2


def _one_loss(args: Any) -> bool:
    return args.top_entropy_quantile < 1.0 or args.distillation_temperature != args.temperature


def _sleep(setting: Setting) -> Iterator[Change]:
    args = setting.args
    if args.use_vllm and args.vllm_mode == "colocate" and not args.vllm_enable_sleep_mode:
        changed = setting.with_args(vllm_enable_sleep_mode=True)
        yield Change({"vllm_enable_sleep_mode": "true"}, "waking the engine in each step", changed)


def _engine_share(setting: Setting) -> Iterator[Change]:
    args = setting.args
    if not args.use_vllm or args.vllm_mode != "colocate":
        return
    share = args.vllm_gpu_memory_utilization
    tried = [step / 100 for step in range(int(share * 100) - 5, 4, -5)]
    if sequences_at_once(setting) < 1:
        tried = [step / 100 for step in range(int(share * 100) + 5, 95, 5)]
    for value in tried:
        changed = setting.with_args(vllm_gpu_memory_utilization=value)
        if sequences_at_once(changed) >= 1:
            yield Change({"vllm_gpu_memory_utilization": f"{value:g}"}, "fewer sequences sampled at once", changed)


def _engine_split(setting: Setting) -> Iterator[Change]:
    args = setting.args
    if not args.use_vllm or args.vllm_mode != "colocate":
        return
    split = 2 * args.vllm_tensor_parallel_size
    heads = getattr(setting.policy.text_config, "num_key_value_heads", None) or 1
    while split <= min(setting.num_gpus, heads) and setting.num_gpus % split == 0:
        changed = setting.with_args(vllm_tensor_parallel_size=split)
        yield Change({"vllm_tensor_parallel_size": str(split)}, "engines that span GPUs", changed)
        split *= 2


def _stage(setting: Setting) -> Iterator[Change]:
    order = ["ddp", "zero1", "zero2", "zero3"]
    kind = setting.sharding.kind
    if setting.num_gpus == 1 or kind not in order or setting.policy.bits < 16:
        return
    for name in order[max(2, order.index(kind) + 1) :]:
        if any(one.args.teacher_offload and _is_whole(one) for one in setting.each.values()):
            continue
        changed = replace(setting, sharding=setting.sharding._replace(kind=name))
        yield Change({"sharding": name}, "weights and gradients travel", changed)


def _optimizer(setting: Setting) -> Iterator[Change]:
    if setting.sharding.stage == 0 and str(setting.args.optim.value).startswith("adamw_torch"):
        changed = setting.with_args(optim=OptimizerNames("adamw_8bit"))
        yield Change({"optim": "adamw_8bit"}, "8-bit moments, and bitsandbytes", changed)


def _is_whole(setting: Setting) -> bool:
    """Whether the teacher is a model of its own."""
    return setting.external is not None or (setting.copies_teacher and not setting.is_lora)


def _teacher_offload(setting: Setting) -> Iterator[Change]:
    if (
        setting.args.teacher != "several"
        and _is_whole(setting)
        and setting.sharding.kind in ("single", "ddp")
        and not setting.args.teacher_offload
    ):
        changed = setting.with_args(teacher_offload=True)
        yield Change({"teacher_offload": "true"}, "the teacher's weights travel from the host in each pass", changed)


def _half_precision(setting: Setting) -> Iterator[Change]:
    policy = setting.policy
    if policy.dtype == torch.float32 and setting.is_lora and setting.precision == "bf16" and policy.bits == 16:
        changed = replace(setting, policy=policy.variant(dtype=torch.bfloat16))
        yield Change({"dtype": "bfloat16"}, "base weights in half precision", changed)


def _adapter(setting: Setting) -> Iterator[Change]:
    if not setting.is_lora:
        from peft import LoraConfig

        adapter = LoraConfig(
            r=64, lora_alpha=128, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        changed = replace(setting, policy=replace(setting.policy, peft_config=adapter))
        flags = {"use_peft": "true", "lora_r": "64", "lora_alpha": "128", "lora_target_modules": "all-linear"}
        yield Change(flags, "an adapter is trained in place of all weights: another run", changed)


# From what changes nothing but time to what changes numbers. An adapter, another run, is for where nothing else helps
_CHANGES = (
    _checkpointing,
    _shorter_passes,
    _sleep,
    _engine_share,
    _engine_split,
    _half_precision,
    _stage,
    _teacher_offload,
    _optimizer,
)
