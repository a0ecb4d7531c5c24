"""Time of an optimizer step by phase: what is computed, moved and launched, against what the accelerator can do."""

from typing import NamedTuple

from ..trainer.signals import has_one_update
from .memory import (
    VLLM_EXTRA,
    gradient_bytes,
    optimizer_bytes,
    weight_bytes,
)
from .models import Model
from .passes import Rows
from .setting import Setting


# Shares of the published figures that are reached. The loss: 4,096 tokens on an H100 (docs/benchmarks.md: 10.2 TFLOP
# in 25 ms). The others are assumed
LOSS_EFFICIENCY = 0.41
BACKBONE_EFFICIENCY = 0.45
BANDWIDTH_EFFICIENCY = 0.6
LINK_EFFICIENCY = 0.7
# Seconds that Python and launches take at least for a layer's forward pass, a backward pass being two: such that the
# steps of a small model on an H100 take what docs/benchmarks.md says they took
LAYER, ADAPTED_LAYER = 2.5e-3, 4.2e-3
# For one token more: a step of vLLM's engine (0.62 to 0.86 s for 256 tokens of 0.6B on an H100); a layer in
# transformers, assumed
ENGINE_STEP, GENERATING_LAYER = 2.9e-3, 1.0e-3
# For each weight that a colocated engine is sent (H100)
SYNC_TENSOR = 1.0e-3
# Between a GPU and the host's memory, assumed
HOST_LINK = 25e9


class Duration(NamedTuple):
    """
    How long a phase takes in an optimizer step.

    Args:
        name (`str`):
            What happens.
        seconds (`float`):
            How long.
        limit (`str`):
            What limits it: `"compute"`, `"memory bandwidth"`, `"launches"` or `"links"`.
    """

    name: str
    seconds: float
    limit: str


def _longest(name: str, **seconds: float) -> Duration:
    limit = max(seconds, key=lambda what: seconds[what])
    return Duration(name, seconds[limit], limit.replace("_", " "))


def forward_flops(model: Model, rows: Rows, number: float) -> float:
    """
    FLOP of the backbone's forward pass over `number` rows. A mask keeps attention from leaving out what it hides.
    """
    text = model.text_config
    width = (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    ) * text.num_attention_heads
    length = rows.prompt + rows.completion
    seen = 0.5 if model.packs or rows.number == 1 else 1.0
    return number * (2 * length * model.num_matrix + 4 * seen * length**2 * width * model.num_layers)


def durations(setting: Setting) -> list[Duration]:
    """
    How long the phases of an optimizer step take where rollouts are as long as may be.

    Args:
        setting ([`Setting`]):
            The run.
    """
    if not setting.gpu.flops:
        return []
    found = [sampling(setting)]
    if setting.args.use_vllm:
        found.append(_synchronisation(setting))
    if setting.signals.needs_scores:
        reads_again = not (setting.signals.can_shape_in_loss and has_one_update(setting.args))
        found.append(_passes(setting, "scores", teacher=1, student=int(reads_again)))
    if setting.args.beta != 0.0:
        found.append(_passes(setting, "reference model", teacher=0, student=1))
    if setting.has_teacher and setting.reads_teacher:
        found.append(_passes(setting, "teacher's pass", teacher=1, student=0))
    backward = (1 if setting.is_lora else 2) + bool(setting.args.gradient_checkpointing)
    found.append(_passes(setting, "student's passes", teacher=0, student=1 + backward, learns=True))
    found.append(_loss(setting))
    found.append(_optimizer_step(setting))
    return found


def sequences_at_once(setting: Setting) -> int:
    """Sequences of the longest kind whose keys and values a vLLM engine on one GPU has room for."""
    args, lengths = setting.args, setting.lengths
    split = args.vllm_tensor_parallel_size if args.vllm_mode == "colocate" else setting.server_gpus
    used = 0.9 if args.vllm_mode == "server" else args.vllm_gpu_memory_utilization
    room = used * setting.gpu.memory - setting.policy.num_parameters * 2 / split - VLLM_EXTRA
    one = setting.policy.cache_bytes(lengths.prompt + lengths.completion) / split
    return max(0, int(room / one))


def sampling(setting: Setting) -> Duration:
    """How long the rollouts of an optimizer step take."""
    args, gpu, policy, lengths = setting.args, setting.gpu, setting.policy, setting.lengths
    steps = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    rows, split = setting.rows_per_generation, 1
    if args.use_vllm:
        split = args.vllm_tensor_parallel_size if args.vllm_mode == "colocate" else setting.server_gpus
        rows *= setting.num_gpus if args.vllm_mode == "server" else split
        waves = -(-rows // max(1, sequences_at_once(setting)))
        floor = ENGINE_STEP
    else:
        waves, floor = 1, GENERATING_LAYER * policy.num_layers
    together = rows / waves
    read = policy.num_parameters * 2 + together * policy.cache_bytes(lengths.prompt + lengths.completion // 2)
    products = 2 * together * (policy.num_matrix + policy.head.numel())
    prompts = forward_flops(policy, Rows(1, lengths.prompt, 0), rows) / (BACKBONE_EFFICIENCY * gpu.flops * split)
    times = {
        "memory_bandwidth": read / (BANDWIDTH_EFFICIENCY * gpu.bandwidth * split),
        "compute": products / (BACKBONE_EFFICIENCY * gpu.flops * split),
        "launches": floor,
    }
    one = _longest("sampling", **times)
    return one._replace(seconds=(one.seconds * lengths.completion * waves + prompts) / max(steps, 1e-9))


def _synchronisation(setting: Setting) -> Duration:
    args, policy = setting.args, setting.policy
    often = args.gradient_accumulation_steps / (args.steps_per_generation * args.num_iterations)
    size = 2 * policy.num_parameters
    if args.vllm_mode == "server":
        return _longest("weight sync", links=min(1.0, often) * size / (LINK_EFFICIENCY * setting.gpu.link))
    moved = 2 * size / (BANDWIDTH_EFFICIENCY * setting.gpu.bandwidth)
    launched = SYNC_TENSOR * sum(1 for one in policy.parameters if not policy.peft_config or not one.requires_grad)
    return _longest("weight sync", memory_bandwidth=min(1.0, often) * moved, launches=min(1.0, often) * launched)


def _passes(setting: Setting, name: str, teacher: int, student: int, learns: bool = False) -> Duration:
    """Passes over all rows of a step: a backward pass computes as much as two forward passes, or one of an adapter."""
    number, gpu = setting.rows_per_step, setting.gpu
    passes = setting.args.gradient_accumulation_steps * setting.num_passes
    layer = ADAPTED_LAYER if setting.is_lora else LAYER
    flops = launches = moved = 0.0
    # Several teachers read as many rows each
    teachers = [(one.teacher, setting.teacher_rows, teacher, number / len(setting.each)) for one in setting.readers]
    for model, rows, times, its in (*teachers, (setting.policy, setting.student_rows, student, number)):
        flops += times * forward_flops(model, rows, its)
        launched = times + 1 if learns and times and setting.is_lora else times
        launches += launched * passes * model.num_layers * layer
        if setting.sharding.shards_weights and times:
            moved += 2 * model.num_parameters * passes * (2 if learns else 1)
    gradients = setting.policy.num_trained * 2
    if learns and setting.num_gpus > 1:
        moved += gradients * (passes if setting.sharding.shards_gradients else 2)
    return _longest(
        name,
        compute=flops / (BACKBONE_EFFICIENCY * gpu.flops),
        launches=launches,
        links=moved / (LINK_EFFICIENCY * gpu.link) if setting.num_gpus > 1 else 0.0,
    )


def _loss(setting: Setting) -> Duration:
    products = 2 + setting.has_teacher + setting.policy.head.requires_grad
    tokens = setting.rows_per_step * setting.lengths.completion
    flops = 2 * products * tokens * setting.policy.head.numel()
    return _longest("loss", compute=flops / (LOSS_EFFICIENCY * setting.gpu.flops))


def _optimizer_step(setting: Setting) -> Duration:
    state, _ = optimizer_bytes(setting)
    if setting.sharding.offloads_optimizer:
        number = setting.policy.num_trained / setting.num_gpus
        return _longest("optimizer step", links=16 * number / HOST_LINK)
    read = (
        2 * state
        + 3 * gradient_bytes(setting)
        + 2 * weight_bytes(setting, setting.policy) * (setting.policy.num_trained / setting.policy.num_parameters)
    )
    return _longest("optimizer step", memory_bandwidth=read / (BANDWIDTH_EFFICIENCY * setting.gpu.bandwidth))
