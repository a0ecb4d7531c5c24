"""The divergence between student and teacher from hidden states, without ever holding their logits.

For each block of rows, both language-model heads are applied, the divergence and its gradient with respect to the
student's logits are computed, and the gradient is folded into those of the hidden states and of the head at once: four
vocabulary-sized matrix products, three when the head is frozen. The backward pass only scales what the forward pass
left.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .blocks import Blocks, default_memory
from .head import Finish, Head
from .kernel import STATISTICS, softmax
from .kernels import default_kernel, load_kernel
from .memory import empty_block, reuse_freed_memory
from .objective import Objective
from .products import add_outer, project, project_back
from .readings import Readings
from .support import chunk_maxima, top_k_agreement, top_k_tokens
from .top_log_probs import TopLogProbs, finite_rows


# Rows whose top k are compared, out of all of a call. It feeds the log alone
NUM_SEARCHED = 64
# Blocks of logits that exist at once where a target is made of three distributions
_COMBINED_SIDES = 8

_logger = logging.getLogger(__name__)


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
    )
    return FusedDivergence(*outputs)


def token_log_probs(
    hidden: torch.Tensor,
    head: Head,
    token_ids: torch.Tensor,
    temperature: float = 1.0,
    memory_budget: float | None = None,
    kernel: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of tokens, and the entropies of the distributions they are from, without a gradient.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Hidden states, row n predicting token n.
        head ([`Head`]):
            Head, with V rows.
        token_ids (`torch.Tensor` of shape `(N,)`):
            Tokens, int64.
        temperature (`float`, *optional*, defaults to `1.0`):
            The logits are divided by it.
        memory_budget (`float`, *optional*):
            See [`fused_divergence`].
        kernel (`str`, *optional*):
            See [`fused_divergence`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: both in nats, of shape `(N,)`, fp32 (fp64 for fp64 inputs).
    """
    plan = _Plan.make(hidden, head.weight, 1, memory_budget, kernel, head_gradient_bytes=0)
    finish = _detached(head, plan.wide)
    outputs = torch.empty(2, hidden.size(0), dtype=plan.wide, device=hidden.device)
    for place, (products,) in _products(plan, [hidden], [head]):
        outputs[:, place] = torch.stack(_log_probs(plan, products, finish, token_ids[place], temperature))
    return outputs[0], outputs[1]


def teacher_choices(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    top_k: int,
    temperature: float = 1.0,
    memory_budget: float | None = None,
    kernel: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How undecided a teacher is between its most probable tokens, and what the student makes of the first of them,
    without a gradient. It takes a vocabulary-sized product of each side.

    Args:
        student_hidden (`torch.Tensor` of shape `(N, H)`):
            Student hidden states, row n predicting token n.
        teacher_hidden (`torch.Tensor` of shape `(N, H_t)`):
            Teacher hidden states for the same tokens.
        student_head ([`Head`]):
            Student head, with V rows.
        teacher_head ([`Head`]):
            Teacher head, with V rows.
        top_k (`int`):
            Number of the teacher's most probable tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Both sets of logits are divided by it.
        memory_budget (`float`, *optional*):
            See [`fused_divergence`].
        kernel (`str`, *optional*):
            See [`fused_divergence`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the entropy of the teacher's distribution over its `top_k` tokens,
        renormalised, and the student's log-probability of the most probable one, both in nats, of shape `(N,)`, fp32
        (fp64 for fp64 inputs).

    Raises:
        ValueError: If the vocabulary has fewer tokens than `top_k`.
    """
    vocabulary = student_head.weight.size(0)
    if top_k > vocabulary:
        raise ValueError(f"`top_k` must be at most {vocabulary}, the tokens of the vocabulary, got {top_k}.")
    heads = [student_head, teacher_head]
    plan = _Plan.make(student_hidden, student_head.weight, 2, memory_budget, kernel, head_gradient_bytes=0)
    student_finish, teacher_finish = (_detached(head, plan.wide) for head in heads)
    outputs = torch.empty(2, student_hidden.size(0), dtype=plan.wide, device=student_hidden.device)
    for place, (student_products, teacher_products) in _products(plan, [student_hidden, teacher_hidden], heads):
        logits = teacher_finish.logits(teacher_products)
        (tokens,) = top_k_tokens([logits], [chunk_maxima(logits)], top_k)
        top = logits.gather(1, tokens)
        first = tokens.gather(1, top.argmax(dim=1, keepdim=True)).squeeze(1)
        _, _, outputs[0, place] = softmax(top, temperature)
        outputs[1, place], _ = _log_probs(plan, student_products, student_finish, first, temperature)
    return outputs[0], outputs[1]


def tokens_in_top_k(
    hidden: torch.Tensor, head: Head, token_ids: torch.Tensor, k: int, memory_budget: float | None = None
) -> torch.Tensor:
    """
    Whether tokens are among the k most probable ones, without a gradient.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Hidden states, row n predicting token n.
        head ([`Head`]):
            Head, with V rows.
        token_ids (`torch.Tensor` of shape `(N,)`):
            Tokens, int64.
        k (`int`):
            Fewer than so many tokens are more probable.
        memory_budget (`float`, *optional*):
            See [`fused_divergence`].

    Returns:
        `torch.Tensor` of shape `(N,)`, bool.
    """
    plan = _Plan.make(hidden, head.weight, 1, memory_budget, "eager", head_gradient_bytes=0)
    finish = _detached(head, plan.wide)
    found = torch.empty(hidden.size(0), dtype=torch.bool, device=hidden.device)
    for place, (products,) in _products(plan, [hidden], [head]):
        logits = finish.logits(products)
        found[place] = (logits > logits.gather(1, token_ids[place].unsqueeze(1))).sum(dim=1) < k
    return found


@torch.no_grad()
def _products(
    plan: "_Plan", states: Sequence[torch.Tensor], heads: Sequence[Head]
) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """The products of hidden states and heads, a few rows at a time, and where these stand among all."""
    device, (block_rows, slice_rows) = states[0].device, plan.blocks
    blocks = [empty_block(block_rows, head.weight.size(0), plan.wide, device) for head in heads]
    with torch.autocast(device.type, enabled=False):
        for rows in _slices(len(states[0]), block_rows):
            size = rows.stop - rows.start
            for hidden, head, block in zip(states, heads, blocks, strict=True):
                project(hidden[rows].to(plan.dtype), head.weight, block[:size], plan.dtype)
            for part in _slices(size, slice_rows):
                place = slice(rows.start + part.start, rows.start + part.stop)
                yield place, [block[part] for block in blocks]


def _log_probs(
    plan: "_Plan", products: torch.Tensor, finish: Finish, token_ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if plan.kernel == "triton":
        from .triton_kernel import triton_token_log_probs

        return triton_token_log_probs(products, finish, token_ids, temperature)
    log_p, _, entropy = softmax(finish.logits(products), temperature)
    return log_p.gather(1, token_ids.unsqueeze(1)).squeeze(1), entropy


class _Plan(NamedTuple):
    # How a call is carried out: dtype of the operands of the products, dtype of all else, kernel and blocks
    dtype: torch.dtype
    wide: torch.dtype
    kernel: str
    blocks: Blocks

    @classmethod
    def make(
        cls,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        num_sides: int,
        memory_budget: float | None,
        kernel: str | None,
        head_gradient_bytes: int,
    ) -> "_Plan":
        device, vocabulary = hidden.device, weight.size(0)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        else:
            dtype = torch.promote_types(hidden.dtype, weight.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        if kernel is None:
            kernel = default_kernel(device, vocabulary, wide)
        elif kernel == "triton" and wide != torch.float32:
            raise ValueError(f"`kernel='triton'` computes in fp32, and the inputs are {dtype}. Leave `kernel` unset.")
        elif kernel == "compiled" and device.type != "cpu":
            raise ValueError(f"`kernel='compiled'` is for CPUs, and the inputs are on {device}. Leave `kernel` unset.")
        if memory_budget is None:
            memory_budget = default_memory(device, head_gradient_bytes)
        blocks = Blocks.fit(hidden.size(0), num_sides * vocabulary * wide.itemsize, memory_budget, kernel)
        _log_once(kernel, round(memory_budget), str(device), vocabulary)
        return cls(dtype, wide, kernel, blocks)


@cache
def _log_once(kernel: str, memory_budget: int, device: str, vocabulary: int) -> None:
    _logger.info(
        "Divergence over %s tokens on %s: %s kernel, %s MiB for blocks of logits.",
        vocabulary,
        device,
        kernel,
        memory_budget,
    )


def _slices(number: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, number)) for start in range(0, number, size)]


def _detached(head: Head, dtype: torch.dtype) -> Finish:
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    return Finish(bias, head.scale, head.softcap)


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
    ):
        device = hidden.device
        if device.type == "cpu":
            reuse_freed_memory()
        num_rows, vocabulary = hidden.size(0), weight.size(0)
        trains_hidden, trains_weight, trains_bias = ctx.needs_input_grad[:3]
        needs_grad = trains_hidden or trains_weight or trains_bias
        is_combined = isinstance(teacher_states, Readings)
        dtype, wide, kernel, (block_rows, slice_rows) = _Plan.make(
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
        top_k = min(objective.top_k, vocabulary)
        search_every = max(1, math.ceil(num_rows / NUM_SEARCHED))
        num_searched = math.ceil(num_rows / search_every)
        overlap = torch.full((num_searched,), math.nan, dtype=wide, device=device)
        top_logits = torch.full((num_searched, top_k), math.nan, dtype=wide, device=device)
        finishes = [
            Finish(None, 1.0, None) if head is None else _detached(head, wide)
            for head in (
                student_head,
                student_head if teacher_states is None else None if is_combined else teacher_head,
            )
        ]

        grad_hidden = torch.empty(hidden.shape, dtype=wide, device=device) if trains_hidden else None
        grad_weight = empty_block(vocabulary, weight.size(1), wide, device) if trains_weight else None
        if grad_weight is not None and num_rows == 0:
            grad_weight.zero_()
        grad_bias = torch.zeros(vocabulary, dtype=wide, device=device) if trains_bias else None

        with torch.autocast(device.type, enabled=False):
            for rows in _slices(num_rows, block_rows):
                start, size = rows.start, rows.stop - rows.start
                student_rows = hidden[rows].to(dtype)
                project(student_rows, weight, student_block[:size], dtype)
                if teacher_states is None:
                    teacher_rows = hidden[rows]
                    if not shares_block:
                        teacher_block[:size] = student_block[:size]
                elif is_combined:
                    teacher_rows = teacher_states[rows]
                    teacher_finish = _detached(teacher_head, wide)
                    teacher_rows.write_logits(
                        teacher_block[:size], teacher_head.weight, teacher_finish, dtype, objective.temperature
                    )
                elif teacher_head is None:
                    teacher_rows = teacher_states.rows(rows)
                    teacher_rows.write_log_probs(teacher_block[:size])
                else:
                    teacher_rows = teacher_states[rows]
                    project(teacher_rows.to(dtype), teacher_head.weight, teacher_block[:size], dtype)
                # Checked here, because a softcap hides infinite ones
                valid = padded(finite_rows(hidden[rows]) & finite_rows(teacher_rows))
                for part in _slices(size, slice_rows):
                    first = part.start + -(start + part.start) % search_every
                    if teacher_states is not None and first < part.stop:
                        searched = slice(first, part.stop, search_every)
                        student_logits = finishes[0].logits(student_block[searched])
                        teacher_logits = finishes[1].logits(teacher_block[searched])
                        index = (start + first) // search_every
                        into = slice(index, index + len(student_logits))
                        tokens = token_ids[start + first : start + part.stop : search_every]
                        overlap[into], top_logits[into] = top_k_agreement(
                            student_logits, teacher_logits, tokens, top_k
                        )
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
        agreement = torch.full((2, num_rows), math.nan, dtype=wide, device=device)
        agreement[0, ::search_every] = overlap
        log_probs = top_logits / objective.temperature + log_prob[::search_every].unsqueeze(1)
        agreement[1, ::search_every] = log_probs.exp().sum(dim=-1)
        outputs += agreement.unbind(0)
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
        return *grads, *[None] * 9


def _scaled(
    grad: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, by_triton: bool, needed_again: bool
) -> torch.Tensor:
    # Converted as it is multiplied, so that it is read once
    out = torch.empty_like(grad, dtype=dtype) if grad.dtype != dtype or needed_again else grad
    if by_triton:
        from .triton_kernel import scale

        return scale(grad, factor, out)
    return torch.mul(grad, factor, out=out)
