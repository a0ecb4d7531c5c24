"""The divergence between student and teacher from hidden states, without ever holding their logits.

For each block of rows, both language-model heads are applied, the divergence and its gradient with respect to the
student's logits are computed, and the gradient is folded into those of the hidden states and of the head at once: four
vocabulary-sized matrix products, three when the head is frozen. The backward pass only scales what the forward pass
left.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .compilation import Compiled
from .head import Finish, Head
from .kernel import STATISTICS, divergence_kernel
from .memory import empty_block, reuse_freed_memory
from .objective import Objective
from .products import add_outer, project, project_back
from .top_log_probs import TopLogProbs


# Below, compiling takes longer than it saves.
_MIN_COMPILED_VOCABULARY = 2**13


class FusedDivergence(NamedTuple):
    """
    Result of [`fused_divergence`]. All but `loss` carry no gradient and have shape `(N,)`, fp32 (fp64 for fp64
    inputs).

    Args:
        loss (`torch.Tensor`):
            Scalar Σ_n weights_n · divergence_n over the rows whose divergence is finite.
        divergence (`torch.Tensor`):
            Divergence of each token, in nats, after clipping.
        student_entropy (`torch.Tensor`):
            Entropy of the student's distribution over the vocabulary, in nats.
        teacher_entropy (`torch.Tensor`):
            Entropy of the teacher's, in nats.
        student_log_prob (`torch.Tensor`):
            Log-probability of the sampled token under the student.
        teacher_log_prob (`torch.Tensor`):
            Log-probability of the sampled token under the teacher.
        top_k_overlap (`torch.Tensor`):
            Share of the teacher's top-k tokens that are among the student's.
        top_k_mass (`torch.Tensor`):
            Probability the student gives to the teacher's top-k tokens.
        clipped (`torch.Tensor`):
            1 where the clip lowered at least one entry, else 0.
        clipped_mass (`torch.Tensor`):
            What the clip took off the divergence, in nats.
        finite (`torch.Tensor`):
            1 where the divergence and its gradient are finite, else 0. Other rows contribute neither loss nor
            gradient.
    """

    loss: torch.Tensor
    divergence: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    student_log_prob: torch.Tensor
    teacher_log_prob: torch.Tensor
    top_k_overlap: torch.Tensor
    top_k_mass: torch.Tensor
    clipped: torch.Tensor
    clipped_mass: torch.Tensor
    finite: torch.Tensor


def fused_divergence(
    student_hidden: torch.Tensor,
    teacher_states: torch.Tensor | TopLogProbs,
    student_head: Head,
    teacher_head: Head | None,
    token_ids: torch.Tensor,
    weights: torch.Tensor,
    objective: Objective,
    memory_budget: float = 256.0,
    compile: bool | None = None,
) -> FusedDivergence:
    """
    Weighted sum over tokens of a divergence between teacher and student.

    Differentiable in `student_hidden` and in the student head's weight and bias. The teacher receives no gradient.
    Matrix products run in the autocast dtype, or else in the dtype of the head, and are summed in fp32; everything
    elementwise and every accumulation is in fp32 too (fp64 for fp64 inputs).

    Args:
        student_hidden (`torch.Tensor` of shape `(N, H)`):
            Student hidden states, row n predicting token n.
        teacher_states (`torch.Tensor` of shape `(N, H_t)` or [`TopLogProbs`]):
            Teacher hidden states for the same tokens, or what a server reports of its distributions.
        student_head ([`Head`]):
            Student head, with V rows.
        teacher_head ([`Head`], *optional*):
            Teacher head, with V rows. It may share the student's tensors. `None` with [`TopLogProbs`].
        token_ids (`torch.Tensor` of shape `(N,)`):
            Sampled tokens, int64.
        weights (`torch.Tensor` of shape `(N,)`):
            Factor of each token's divergence in the loss. It may be negative.
        objective ([`Objective`]):
            Which divergence, over which tokens.
        memory_budget (`float`, *optional*, defaults to `256.0`):
            MiB this may take beyond its inputs and their gradients, whatever N is. It sets the number of rows
            processed at once; a single row is always processed, and a head of another dtype than the products is
            converted in tiles of 32 MiB.
        compile (`bool`, *optional*):
            Whether to fuse the elementwise work with torch.compile. `None` does from a vocabulary of 8,192 on. Where
            compiling fails, a warning says so and the work runs uncompiled.

    Returns:
        [`FusedDivergence`]: the loss and what the log needs, from the same pass.

    Raises:
        ValueError: If the two heads have different vocabularies, or if [`TopLogProbs`] do not determine the objective.
    """
    vocabulary = student_head.weight.size(0)
    if isinstance(teacher_states, TopLogProbs):
        teacher_states.check(objective)
    elif teacher_head is not None and teacher_head.weight.size(0) != vocabulary:
        raise ValueError(
            f"The teacher's vocabulary has {teacher_head.weight.size(0)} entries and the student's {vocabulary}. A "
            "divergence between them is undefined: use a teacher with the student's tokenizer."
        )
    if compile is None:
        compile = vocabulary >= _MIN_COMPILED_VOCABULARY
    inputs: tuple[torch.Tensor | None, ...] = (student_hidden, student_head.weight, student_head.bias)
    if not torch.is_grad_enabled():  # inside the function grad mode is always off, and the gradients would be computed
        inputs = tuple(None if tensor is None else tensor.detach() for tensor in inputs)
    outputs = _FusedDivergenceFunction.apply(
        *inputs,
        student_head,
        teacher_states,
        teacher_head,
        token_ids,
        weights,
        objective,
        memory_budget,
        _compiled_kernel() if compile else divergence_kernel,
    )
    return FusedDivergence(*outputs)


@cache
def _compiled_kernel() -> Compiled:
    return Compiled(divergence_kernel)


class _Blocks(NamedTuple):
    # A block of rows goes through the matrix products at once. Its elementwise work is done slice by slice, so that
    # the temporaries, up to a dozen of a slice's size, are small and stay in cache.
    block_rows: int
    slice_rows: int

    @classmethod
    def fit(cls, num_rows: int, row_bytes: int, memory_budget: float, fixed_slices: bool) -> "_Blocks":
        """As few and as equal blocks as seven eighths of the budget allow; the rest is for everything else."""
        budget = memory_budget * 2**20
        if fixed_slices:  # a compiled kernel is compiled anew for every size, and has half as many temporaries
            slice_rows = _floor_to_power_of_two(budget / 32 / row_bytes)
        else:
            slice_rows = min(_floor_to_power_of_two(budget / 64 / row_bytes), max(1, num_rows))
        most = max(1, int(budget * 7 / 8 / row_bytes) // slice_rows)
        num_slices = max(1, math.ceil(num_rows / slice_rows))
        num_blocks = math.ceil(num_slices / most)
        return cls(math.ceil(num_slices / num_blocks) * slice_rows, slice_rows)


def _floor_to_power_of_two(number: float) -> int:
    return 2 ** (int(max(1, number)).bit_length() - 1)


class _FusedDivergenceFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        student_head,
        teacher_states,
        teacher_head,
        token_ids,
        weights,
        objective,
        memory_budget,
        kernel,
    ):
        device = hidden.device
        if device.type == "cpu":
            reuse_freed_memory()
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        else:
            dtype = torch.promote_types(hidden.dtype, weight.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        num_rows, vocabulary = hidden.size(0), weight.size(0)
        weights = weights.to(wide)
        # Gradients are kept relative to the largest weight: fp16 would round small ones to 0 before a loss scale helps
        peak = weights.abs().max().clamp(min=torch.finfo(wide).tiny) if num_rows else weights.new_ones(())
        trains_hidden, trains_weight, trains_bias = ctx.needs_input_grad[:3]
        needs_grad = trains_hidden or trains_weight or trains_bias

        grad_dtype = dtype if device.type == "cuda" else wide
        row_bytes = vocabulary * (2 * wide.itemsize + (0 if grad_dtype == wide else grad_dtype.itemsize))
        block_rows, slice_rows = _Blocks.fit(num_rows, row_bytes, memory_budget, isinstance(kernel, Compiled))
        student_block, teacher_block = (empty_block(block_rows, vocabulary, wide, device) for _ in range(2))
        grad_block = student_block if grad_dtype == wide else torch.empty_like(student_block, dtype=grad_dtype)
        padding = (0, slice_rows)  # rows past the last token are computed with the others, and ignored
        token_ids = pad(token_ids, padding)
        factors = pad(weights / peak / objective.temperature, padding)
        statistics = torch.zeros(len(STATISTICS), num_rows + slice_rows, dtype=wide, device=device)
        finishes = [
            Finish(None, 1.0, None)
            if head is None
            else Finish(None if head.bias is None else head.bias.detach().to(wide), head.scale, head.softcap)
            for head in (student_head, teacher_head)
        ]

        grad_hidden = torch.empty(hidden.shape, dtype=wide, device=device) if trains_hidden else None
        grad_weight = empty_block(vocabulary, weight.size(1), wide, device) if trains_weight else None
        if grad_weight is not None and num_rows == 0:
            grad_weight.zero_()
        grad_bias = torch.zeros(vocabulary, dtype=wide, device=device) if trains_bias else None

        with torch.autocast(device.type, enabled=False):
            for start in range(0, num_rows, block_rows):
                rows = slice(start, min(start + block_rows, num_rows))
                size = rows.stop - start
                student_rows = hidden[rows].to(dtype)
                project(student_rows, weight, student_block[:size], dtype)
                if teacher_head is None:
                    teacher_rows = teacher_states.rows(rows)
                    teacher_rows.write_log_probs(teacher_block[:size])
                else:
                    teacher_rows = teacher_states[rows]
                    project(teacher_rows.to(dtype), teacher_head.weight, teacher_block[:size], dtype)
                # Checked here, because a softcap hides infinite ones
                valid = pad(hidden[rows].isfinite().all(dim=-1) & teacher_rows.isfinite().all(dim=-1), padding)
                for first in range(0, size, slice_rows):
                    part, place = slice(first, first + slice_rows), slice(start + first, start + first + slice_rows)
                    statistics[:, place] = kernel(
                        student_block[part],
                        teacher_block[part],
                        *finishes,
                        token_ids[place],
                        factors[place],
                        valid[part],
                        objective,
                        needs_grad,
                        None if grad_block is student_block else grad_block[part],
                    )
                if not needs_grad:
                    continue
                grad = grad_block[:size]
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0, dtype=wide)
                if grad_hidden is not None:
                    project_back(grad, weight, grad_hidden[rows], dtype)
                if grad_weight is not None:
                    finite = statistics[-1, rows].bool()
                    student_rows = student_rows.masked_fill(~finite[:, None], 0.0)
                    add_outer(grad, student_rows, grad_weight, dtype, first=start == 0)

        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(peak, grad_hidden, grad_weight, grad_bias)
        outputs = statistics[:, :num_rows].unbind(0)
        loss = (outputs[0] * weights).sum()
        ctx.mark_non_differentiable(*outputs)
        return loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        peak, *grads = ctx.saved_tensors
        factor = grad_loss * peak
        if torch._C._autograd._get_current_graph_task_keep_graph():  # they will be needed again
            grads = [None if grad is None else grad * factor for grad in grads]
        else:
            grads = [None if grad is None else grad.mul_(factor) for grad in grads]
        grads = [None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)]
        return *grads, *[None] * 8
