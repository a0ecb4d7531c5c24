"""The divergence between student and teacher from hidden states, without ever holding their logits.

For each block of rows, both language-model heads are applied, the divergence and its gradient with respect to the
student's logits are computed, and the gradient is folded into those of the hidden states and of the head at once: four
vocabulary-sized matrix products, three when the head is frozen. The backward pass only scales what the forward pass
left.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .execution import Execution, slices
from .head import Finish, Head
from .kernel import STATISTICS
from .kernels import load_kernel
from .memory import empty_block, reuse_freed_memory
from .most_probable import Agreement, Listed
from .objective import Objective
from .products import add_outer, project, project_back
from .readings import Readings
from .top_log_probs import TopLogProbs, finite_rows


# Blocks of logits that exist at once where a target is made of three distributions
_COMBINED_SIDES = 8


class FusedDivergence(NamedTuple):
    """
    Result of [`fused_divergence`]. All but `loss` carry no gradient and have shape `(N,)`, fp32 (fp64 for fp64
    inputs).

    Args:
        loss (`torch.Tensor`):
            Scalar Σ_n weights_n · divergence_n − likelihood_weights_n · log p_S,n(y_n), over the finite rows.
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
        clipped (`torch.Tensor`):
            1 where the clip lowered at least one entry, else 0.
        clipped_mass (`torch.Tensor`):
            What the clip took off the divergence, in nats.
        finite (`torch.Tensor`):
            1 where the loss and its gradient are finite, else 0. Other rows contribute neither.
        top_k_overlap (`torch.Tensor`):
            Share of the teacher's top-k tokens that are among the student's. It is measured on at most 64 rows, evenly
            spaced, and NaN for the others, as it is without a teacher.
        top_k_mass (`torch.Tensor`):
            Probability the student gives to the teacher's top-k tokens, for the same rows.
        listed_tokens (`torch.Tensor` of shape `(N, 2, num_listed)`):
            The most probable tokens under the student and under the teacher, most probable first, int64.
        listed_log_probs (`torch.Tensor` of shape `(N, 2, num_listed)`):
            Their log-probabilities, −inf where a server has not reported as many.
    """

    loss: torch.Tensor
    divergence: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    student_log_prob: torch.Tensor
    teacher_log_prob: torch.Tensor
    clipped: torch.Tensor
    clipped_mass: torch.Tensor
    finite: torch.Tensor
    top_k_overlap: torch.Tensor
    top_k_mass: torch.Tensor
    listed_tokens: torch.Tensor
    listed_log_probs: torch.Tensor


def fused_divergence(
    student_hidden: torch.Tensor,
    teacher_states: torch.Tensor | Readings | TopLogProbs | None,
    student_head: Head,
    teacher_head: Head | None,
    token_ids: torch.Tensor,
    weights: torch.Tensor,
    objective: Objective,
    likelihood_weights: torch.Tensor | None = None,
    memory_budget: float | None = None,
    kernel: str | None = None,
    num_listed: int = 0,
) -> FusedDivergence:
    """
    Weighted sum over tokens of a divergence between teacher and student and, if asked for, of the negative
    log-likelihood of the sampled tokens, from the same logits.

    Differentiable in `student_hidden` and in the student head's weight and bias. The teacher receives no gradient.
    Matrix products run in the autocast dtype, or else in the dtype of the head, and are summed in fp32; everything
    elementwise and every accumulation is in fp32 too (fp64 for fp64 inputs).

    Args:
        student_hidden (`torch.Tensor` of shape `(N, H)`):
            Student hidden states, row n predicting token n.
        teacher_states (`torch.Tensor` of shape `(N, H_t)`, [`Readings`] or [`TopLogProbs`], *optional*):
            Teacher hidden states for the same tokens, those after several prompts of which the target is made, or what
            a server reports of its distributions. `None` for the likelihood alone, at a product less: the student then
            stands in for the teacher.
        student_head ([`Head`]):
            Student head, with V rows.
        teacher_head ([`Head`], *optional*):
            Teacher head, with V rows. It may share the student's tensors. `None` without teacher states.
        token_ids (`torch.Tensor` of shape `(N,)`):
            Sampled tokens, int64.
        weights (`torch.Tensor` of shape `(N,)`):
            Factor of each token's divergence in the loss. It may be negative.
        objective ([`Objective`]):
            Which divergence, over which tokens.
        likelihood_weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Factor of each token's −log p_S(y), at the temperature of the objective, in the loss. It may be negative.
        memory_budget (`float`, *optional*):
            MiB this may take beyond its inputs and their gradients, whatever N is. It sets the number of rows
            processed at once; a single row is always processed, and a head of another dtype than the products is
            converted in tiles of 32 MiB. `None` chooses by the device, see [`default_memory`].
        kernel (`str`, *optional*):
            What does the elementwise work: `"triton"` (on GPUs, in fp32), `"compiled"` (by torch.compile, on CPUs) or
            `"eager"`. `None` chooses, see [`default_kernel`]. Where compiling fails, a warning says so and the work
            runs uncompiled.
        num_listed (`int`, *optional*, defaults to `0`):
            Number of most probable tokens to list on both sides, the whole vocabulary if that is less.

    Returns:
        [`FusedDivergence`]: the loss and what the log needs, from the same pass.

    Raises:
        ValueError: If the two heads have different vocabularies, if [`TopLogProbs`] do not determine the objective, or
            if the kernel does not run on this device and in this dtype.
    """
    vocabulary = student_head.weight.size(0)
    if teacher_states is None:
        objective = Objective(support="sampled_token", top_k=objective.top_k, temperature=objective.temperature)
    if isinstance(teacher_states, TopLogProbs):
        teacher_states.check(objective)
    elif teacher_head is not None and teacher_head.weight.size(0) != vocabulary:
        raise ValueError(
            f"The teacher's vocabulary has {teacher_head.weight.size(0)} entries and the student's {vocabulary}. A "
            "divergence between them is undefined: use a teacher with the student's tokenizer."
        )
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
        likelihood_weights,
        objective,
        memory_budget,
        kernel,
        num_listed,
    )
    return FusedDivergence(*outputs)


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
        likelihood_weights,
        objective,
        memory_budget,
        kernel,
        num_listed,
    ):
        device = hidden.device
        if device.type == "cpu":
            reuse_freed_memory()
        num_rows, vocabulary = hidden.size(0), weight.size(0)
        trains_hidden, trains_weight, trains_bias = ctx.needs_input_grad[:3]
        needs_grad = trains_hidden or trains_weight or trains_bias
        is_combined = isinstance(teacher_states, Readings)
        dtype, wide, kernel, (block_rows, slice_rows) = Execution.plan(
            hidden,
            weight,
            _COMBINED_SIDES if is_combined else 2,
            memory_budget,
            kernel,
            4 * weight.numel() if trains_weight else 0,
        )
        run_kernel = load_kernel(kernel)
        weights = weights.to(wide)
        if likelihood_weights is not None:
            likelihood_weights = likelihood_weights.to(wide)
        # Kept relative to their peak, or fp16 would round small gradients to 0 before a loss scale reaches them
        peak = None
        if dtype == torch.float16 and num_rows:
            both = weights if likelihood_weights is None else torch.cat([weights, likelihood_weights])
            peak = both.abs().max().clamp(min=torch.finfo(wide).tiny)

        student_block = empty_block(block_rows, vocabulary, wide, device)
        # Without a teacher both are the same memory: a row is read before it is written over. Compiled code assumes
        # that it is not
        shares_block = teacher_states is None and kernel != "compiled"
        teacher_block = student_block if shares_block else empty_block(block_rows, vocabulary, wide, device)
        grad_block = student_block
        if device.type == "cuda" and dtype != wide:  # the first half of each row's memory
            grad_block = student_block.view(dtype)[:, :vocabulary]
        fixed = kernel == "compiled"
        # A compiled kernel computes some rows past the last token with the others; they are ignored
        num_ignored = slice_rows if fixed else 0

        def padded(rows: torch.Tensor) -> torch.Tensor:
            return pad(rows, (0, num_ignored)) if num_ignored else rows

        def as_factors(weights: torch.Tensor) -> torch.Tensor:
            return padded((weights if peak is None else weights / peak) / objective.temperature)

        token_ids, factors = padded(token_ids), as_factors(weights)
        likelihood_factors = None if likelihood_weights is None else as_factors(likelihood_weights)
        statistics = torch.empty(len(STATISTICS), num_rows + num_ignored, dtype=wide, device=device)
        agreement = Agreement(num_rows, min(objective.top_k, vocabulary), wide, device)
        listed = Listed(num_rows, min(num_listed, vocabulary), wide, device)
        finishes = [
            Finish(None, 1.0, None) if head is None else head.detached(wide)
            for head in (
                student_head,
                student_head if teacher_states is None else None if is_combined else teacher_head,
            )
        ]
        sides = list(zip((student_block, teacher_block), finishes, strict=True))

        grad_hidden = torch.empty(hidden.shape, dtype=wide, device=device) if trains_hidden else None
        grad_weight = empty_block(vocabulary, weight.size(1), wide, device) if trains_weight else None
        if grad_weight is not None and num_rows == 0:
            grad_weight.zero_()
        grad_bias = torch.zeros(vocabulary, dtype=wide, device=device) if trains_bias else None

        with torch.autocast(device.type, enabled=False):
            for rows in slices(num_rows, block_rows):
                start, size = rows.start, rows.stop - rows.start
                student_rows = hidden[rows].to(dtype)
                project(student_rows, weight, student_block[:size], dtype)
                # Finite ones are told here, because a softcap hides infinite ones
                valid = finite_rows(hidden[rows])
                if teacher_states is not None:
                    out = teacher_block[:size]
                    valid &= _write_teacher(out, teacher_states, rows, teacher_head, dtype, objective.temperature)
                elif not shares_block:
                    teacher_block[:size] = student_block[:size]
                valid = padded(valid)
                for part in slices(size, slice_rows):
                    if teacher_states is not None:
                        agreement.compare(start, part, sides, token_ids)
                    if num_listed:
                        listed.fill(start, part, sides, objective.temperature, teacher_states)
                    if fixed:
                        part = slice(part.start, part.start + slice_rows)
                    place = slice(start + part.start, start + part.stop)
                    statistics[:, place] = run_kernel(
                        student_block[part],
                        teacher_block[part],
                        *finishes,
                        token_ids[place],
                        factors[place],
                        None if likelihood_factors is None else likelihood_factors[place],
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
        ctx.by_triton = kernel == "triton"
        ctx.save_for_backward(peak, grad_hidden, grad_weight, grad_bias)
        outputs = list(statistics[:, :num_rows].unbind(0))
        finite, log_prob = (outputs[STATISTICS.index(name)] for name in ("finite", "student_log_prob"))
        outputs += [*agreement.figures(log_prob, objective.temperature), listed.tokens, listed.log_probs]
        loss = (outputs[0] * weights).sum()
        if likelihood_weights is not None:
            counted = finite.bool() & (likelihood_weights != 0)
            loss = loss - torch.where(counted, likelihood_weights * log_prob, 0.0).sum()
        ctx.mark_non_differentiable(*outputs)
        return loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        peak, *grads = ctx.saved_tensors
        factor = grad_loss if peak is None else grad_loss * peak
        needed_again = torch._C._autograd._get_current_graph_task_keep_graph()
        grads = [
            None if grad is None else _scaled(grad, factor, dtype, ctx.by_triton, needed_again)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return *grads, *[None] * 10


def _write_teacher(
    out: torch.Tensor,
    states: torch.Tensor | Readings | TopLogProbs,
    rows: slice,
    head: Head | None,
    dtype: torch.dtype,
    temperature: float,
) -> torch.Tensor:
    # Some rows of the teacher: its products, or what stands for logits already. Returns which are finite
    if head is None:
        assert isinstance(states, TopLogProbs)
        known = states.rows(rows)
        known.write_log_probs(out)
        return finite_rows(known)
    assert not isinstance(states, TopLogProbs)
    some = states[rows]
    if isinstance(some, Readings):
        some.write_logits(out, head.weight, head.detached(out.dtype), dtype, temperature)
    else:
        project(some.to(dtype), head.weight, out, dtype)
    return finite_rows(some)


def _scaled(
    grad: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, by_triton: bool, needed_again: bool
) -> torch.Tensor:
    # Converted as it is multiplied, so that it is read once
    out = torch.empty_like(grad, dtype=dtype) if grad.dtype != dtype or needed_again else grad
    if by_triton:
        from .triton_kernel import scale

        return scale(grad, factor, out)
    return torch.mul(grad, factor, out=out)
