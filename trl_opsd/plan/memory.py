"""Memory of each GPU: which part takes how much, in each phase of a step."""

from typing import NamedTuple

import torch

from ..objective.blocks import Blocks, default_memory
from ..objective.kernels import default_kernel
from ..objective.products import TILE_ELEMENTS
from .models import Model
from .setting import HALF, Setting


MIB, GIB = 2**20, 2**30

# What is there beside tensors: the context of CUDA with the libraries of matrix products and Triton's kernels, NCCL's
# buffers, and the share of all else that the allocator cannot use for want of pieces of the right size
CONTEXT, NCCL, FRAGMENTS = 0.7 * GIB, 0.5 * GIB, 0.04
# What vLLM takes beside weights and keys and values: activations of its largest batch, CUDA graphs
VLLM_EXTRA = 2.5 * GIB
# What an engine that sleeps keeps
VLLM_ASLEEP = 0.25 * GIB
# Slices of a block that the kernel of torch holds at once, as it is and compiled
_SLICES = {"eager": 8, "compiled": 4, "triton": 0}
# DeepSpeed's defaults, in weights: those it gathers ahead, and those of a bucket of gradients
_ZERO3_LIVE, _ZERO_BUCKET = 10**9, 5 * 10**8
# Bytes that an optimizer keeps of each weight, beside the dtype of the weight: number of states, bytes of one (0: the
# weight's own), and how many times the gradients its step takes
_OPTIMIZERS = {
    "adamw_torch_fused": (2, 0, 0),
    "adamw_torch": (2, 0, 1),
    "adamw_8bit": (2, 1, 0),
    "adamw_bnb_8bit": (2, 1, 0),
    "paged_adamw_8bit": (2, 1, 0),
    "paged_adamw_32bit": (2, 4, 0),
    "paged_adamw": (2, 4, 0),
    "lion_32bit": (1, 4, 0),
    "lion_8bit": (1, 1, 0),
    "sgd": (0, 0, 0),
}


class Phase(NamedTuple):
    """
    What is there at once.

    Args:
        name (`str`):
            What happens.
        parts (`dict[str, int]`):
            Bytes by part.
    """

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


class LossMemory(NamedTuple):
    """
    What the fused loss takes.

    Args:
        blocks (`int`):
            Bytes of the blocks of logits and of what the kernel takes beside them.
        hidden (`int`):
            Bytes of the fp32 gradient of the hidden states.
        head (`int`):
            Bytes of the fp32 gradient of the head, 0 if it is frozen.
        budget (`float`):
            MiB that it may take.
        kernel (`str`):
            What does the elementwise work.
        block_rows (`int`):
            Rows of a block.
    """

    blocks: int
    hidden: int
    head: int
    budget: float
    kernel: str
    block_rows: int


def share(size: float, setting: Setting, is_shared: bool) -> int:
    """What each process holds of something."""
    return -(-int(size) // setting.num_gpus) if is_shared else int(size)


def weight_bytes(setting: Setting, model: Model) -> int:
    """Bytes of a model's weights on each GPU, as far as they stay there."""
    sharding = setting.sharding
    if sharding.offloads_weights:
        return 0
    size = model.bytes()
    if setting.converts_weights and model.bits == 16:
        # FSDP2 keeps what it trains in fp32, and converts what it gathers
        size = model.bytes(torch.float32 if sharding.kind == "fsdp2" else HALF[setting.precision])
    return share(size, setting, sharding.shards_weights)


def teacher_bytes(setting: Setting) -> int:
    """Bytes of what the teacher, or all of several, has of its own on each GPU."""
    return sum(_teacher_bytes(one) for one in setting.each.values())


def _teacher_bytes(setting: Setting) -> int:
    if setting.external is not None:
        return 0 if setting.args.teacher_offload else weight_bytes(setting, setting.external)
    if not setting.copies_teacher:
        return 0
    policy, is_half = setting.policy, setting.converts_weights and setting.sharding.stage > 0
    if setting.is_lora:
        copied = sum(one.numel() * (2 if is_half else one.dtype.itemsize) for one in policy.trained)
        copied = share(copied, setting, setting.sharding.shards_weights)
        number, itemsize = policy.num_trained, 2 if is_half else policy.trained[0].dtype.itemsize
    else:
        copied = 0 if setting.args.teacher_offload else weight_bytes(setting, policy)
        number, itemsize = policy.num_parameters, copied * setting.num_gpus // policy.num_parameters
        itemsize = 2 if is_half else policy.dtype.itemsize
    averages = setting.args.teacher == "ema" and itemsize < 4 and not setting.args.teacher_offload
    return copied + share(4 * number * averages, setting, setting.sharding.shards_weights)


def gradient_bytes(setting: Setting) -> int:
    """Bytes of the gradients that each GPU keeps until the optimizer's step."""
    half = setting.converts_weights
    if setting.sharding.kind == "fsdp2":
        size = sum(one.numel() * (4 if half else one.dtype.itemsize) for one in setting.policy.trained)
    else:
        size = sum(one.numel() * (2 if half else one.dtype.itemsize) for one in setting.policy.trained)
    if setting.sharding.shards_gradients and setting.sharding.offloads_optimizer and setting.sharding.stage:
        return 0
    return share(size, setting, setting.sharding.shards_gradients)


def optimizer_bytes(setting: Setting) -> tuple[int, int]:
    """Bytes of the optimizer's state on each GPU, and what its step takes beside it."""
    sharding, trained = setting.sharding, setting.policy.trained
    states, itemsize, temporaries = _OPTIMIZERS.get(str(setting.args.optim.value), (2, 0, 0))
    number = setting.policy.num_trained
    if sharding.offloads_optimizer:
        return 0, 0
    if sharding.stage > 0:  # fp32 weights beside the states; gradients become fp32 for the step
        part = share(number, setting, True)
        grads = 4 * (min(part, _ZERO3_LIVE) if sharding.stage == 3 else part)
        return part * (4 + states * (itemsize or 4)), grads if setting.converts_weights else 0
    own = 4 if setting.converts_weights else None
    sizes = [(one.numel(), own or one.dtype.itemsize) for one in trained]
    kept = sum(count * states * (itemsize or size) for count, size in sizes)
    step = sum(count * size for count, size in sizes) * temporaries
    return share(kept, setting, sharding.shards_optimizer), share(step, setting, sharding.shards_optimizer)


def loss_memory(setting: Setting, taken: int) -> LossMemory:
    """
    What the fused loss takes beside hidden states and heads.

    Args:
        setting ([`Setting`]):
            The run.
        taken (`int`):
            Bytes that are in use when it begins.
    """
    args, policy = setting.args, setting.policy
    number, vocabulary = setting.student_rows.num_completion_tokens, policy.vocabulary
    head = 4 * policy.head.numel() if policy.head.requires_grad else 0
    device = torch.device("cpu" if setting.gpu.is_cpu else "cuda")
    kernel = args.divergence_kernel or ("triton" if device.type == "cuda" else default_kernel(device, vocabulary))
    budget = args.divergence_memory or default_memory(device, head, max(0, setting.gpu.memory - taken))
    fitted = Blocks.fit(number, 2 * vocabulary * 4, budget, kernel)
    row = 4 * vocabulary
    sides = 2 if setting.has_teacher or kernel == "compiled" else 1
    temporaries = max(_SLICES[kernel] * fitted.slice_rows * row, _conversions(setting, fitted.block_rows))
    hidden = 4 * number * policy.head.size(1)
    return LossMemory(sides * fitted.block_rows * row + temporaries, hidden, head, budget, kernel, fitted.block_rows)


def _conversions(setting: Setting, block_rows: int) -> int:
    """Bytes of the operands of a product that are converted, tile by tile."""
    head, is_half = setting.policy.head, setting.precision != "no" or setting.policy.dtype.itemsize == 2
    if not is_half:
        return 0
    tile = min(head.numel(), TILE_ELEMENTS)
    is_fp32 = head.dtype.itemsize == 4 and not setting.converts_weights
    if not setting.gpu.is_cpu:
        return 2 * tile * is_fp32
    # A CPU has no product of halves that is summed in fp32
    columns = min(head.size(0), TILE_ELEMENTS // head.size(1))
    return 4 * block_rows * columns + (6 if is_fp32 else 4) * tile


def gathered_bytes(setting: Setting, model: Model) -> int:
    """Bytes of the whole weights that layers see while they are sharded: DeepSpeed's default, or two layers."""
    itemsize = 2 if setting.precision != "no" else model.dtype.itemsize
    if setting.sharding.stage == 3:
        return itemsize * min(model.num_parameters, _ZERO3_LIVE + model.largest_module)
    if setting.sharding.kind == "fsdp2":
        edges = {id(one): one.numel() for one in (model.head, model.embedding)}
        return itemsize * (2 * model.num_layer + sum(edges.values()))
    return 0


def communication_bytes(setting: Setting) -> int:
    """Bytes of the buffers in which gradients travel."""
    sharding, policy = setting.sharding, setting.policy
    if sharding.kind == "ddp":
        return sum(one.numel() * one.dtype.itemsize for one in policy.trained)
    if sharding.stage:
        itemsize = 2 if setting.converts_weights else 4
        return itemsize * _ZERO_BUCKET
    if sharding.kind == "fsdp2":
        return 6 * policy.num_layer if not setting.is_lora else 0
    return 0


def sampler_bytes(setting: Setting) -> tuple[int, int]:
    """Bytes of what samples on each GPU: while it samples, and while the trainer learns."""
    args = setting.args
    if not args.use_vllm:
        rows, lengths = setting.rows_per_generation, setting.lengths
        itemsize = 2 if setting.precision != "no" else setting.policy.dtype.itemsize
        cache = setting.policy.cache_bytes(rows * (lengths.prompt + lengths.completion), itemsize)
        # One layer's is there twice while a token is added; logits of the last position, as they are and warped
        layer = cache // setting.policy.num_layers
        return cache + max(layer + 12 * rows * setting.policy.vocabulary, setting.prefill().forward), 0
    if args.vllm_mode == "server":
        return 0, 0
    pool = int(args.vllm_gpu_memory_utilization * setting.gpu.memory)
    return pool, int(VLLM_ASLEEP) if args.vllm_enable_sleep_mode else pool


def phases(setting: Setting) -> list[Phase]:
    """
    What is there in each phase of a step.

    Args:
        setting ([`Setting`]):
            The run.
    """
    policy, accumulated = setting.policy, gradient_bytes(setting)
    # ZeRO-3 has a place for them throughout
    before = accumulated if setting.is_accumulating or setting.sharding.stage == 3 else 0
    state, step = optimizer_bytes(setting)
    sampling, resident = sampler_bytes(setting)
    has_reference = setting.args.beta != 0.0 and not setting.is_lora
    base = {
        "weights": weight_bytes(setting, policy),
        "teacher": teacher_bytes(setting),
        "reference model": weight_bytes(setting, policy) if has_reference else 0,
        "optimizer": state,
        "buffers": communication_bytes(setting),
        "sampler": resident,
    }
    gathered = gathered_bytes(setting, policy)
    whole = policy.num_parameters * 2 if setting.sharding.shards_weights and not setting.args.use_vllm else gathered
    found = [Phase("sampling", base | {"gathered": whole, "sampler": sampling})]
    states = 0
    if setting.reads_teacher:
        # One of several after another, over rows that may all be its own
        states = max(one.teacher_pass().saved for one in setting.readers)
        read = max(map(_reading, setting.readers), key=lambda parts: sum(parts.values()))
        found.append(Phase("teacher", base | {"gradients": before} | read))
    student = setting.student_pass()
    learning = base | {"gathered": gathered}
    dequantised = 2 * policy.largest_module if policy.bits < 16 else 0
    forward = {"gradients": before, "activations": student.forward + states + dequantised}
    found.append(Phase("forward", learning | forward))
    saved = {"gradients": before, "activations": student.saved + states}
    taken = sum((learning | saved).values())
    loss = loss_memory(setting, taken)
    in_loss = {"logits blocks": loss.blocks, "loss gradients": loss.hidden + loss.head}
    found.append(Phase("loss", learning | saved | in_loss))
    found.append(_backward(setting, learning, accumulated, before, loss, dequantised))
    found.append(Phase("optimizer", base | {"gradients": accumulated, "optimizer": state + step}))
    return [_with_overhead(setting, phase) for phase in found]


def _reading(setting: Setting) -> dict[str, int]:
    """What a teacher's pass takes."""
    on_the_fly = setting.teacher.largest_module * 4 if setting.args.teacher_offload else 0
    read = setting.teacher_pass().forward + on_the_fly
    return {"gathered": gathered_bytes(setting, setting.teacher), "activations": read}


def _backward(
    setting: Setting, learning: dict[str, int], gradients: int, before: int, loss: LossMemory, dequantised: int
) -> Phase:
    """The largest of its moments: the loss, the last layer, the first layer."""
    student, policy = setting.student_pass(), setting.policy
    keeps_whole = not setting.sharding.shards_gradients
    itemsize = HALF[setting.precision].itemsize if setting.converts_weights else policy.head.dtype.itemsize
    is_tied = policy.head is policy.embedding
    head, embedding = (
        one.numel() * itemsize if one.requires_grad and keeps_whole else 0 for one in (policy.head, policy.embedding)
    )
    at_embedding = student.embedding
    if is_tied:  # the two gradients of the one weight wait for each other, and are summed into a third
        at_embedding += embedding * (2 if before else 1)
    last = max(student.last + dequantised, at_embedding)
    if not is_tied and not before:  # its gradient is not there yet, or among the others
        last -= embedding
    moments = [
        {
            "gradients": before + (0 if itemsize == 4 else head),
            "activations": student.saved,
            "loss gradients": loss.hidden + loss.head,
        },
        {
            "gradients": before + (head if is_tied or not before else 0),
            "activations": student.backward + dequantised,
        },
        {"gradients": gradients, "activations": last},
    ]
    return Phase("backward", learning | max(moments, key=lambda parts: sum(parts.values())))


def _with_overhead(setting: Setting, phase: Phase) -> Phase:
    if setting.gpu.is_cpu:
        return phase
    fixed = CONTEXT + (NCCL if setting.num_gpus > 1 else 0)
    sampler = phase.parts.get("sampler", 0) if setting.args.use_vllm else 0
    return Phase(phase.name, phase.parts | {"overhead": int(fixed + FRAGMENTS * (phase.total - sampler))})
