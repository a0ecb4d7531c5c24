"""What is read off the logits of a head without a gradient, a block of rows at a time."""

from collections.abc import Iterator, Sequence

import torch

from .execution import Execution, slices
from .head import Finish, Head
from .kernel import softmax
from .memory import empty_block
from .products import project
from .support import chunk_maxima, top_k_tokens


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
            See [`~trl_opsd.objective.fused_divergence`].
        kernel (`str`, *optional*):
            See [`~trl_opsd.objective.fused_divergence`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: both in nats, of shape `(N,)`, fp32 (fp64 for fp64 inputs).
    """
    plan = Execution.plan(hidden, head.weight, 1, memory_budget, kernel, head_gradient_bytes=0)
    finish = head.detached(plan.wide)
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
            See [`~trl_opsd.objective.fused_divergence`].
        kernel (`str`, *optional*):
            See [`~trl_opsd.objective.fused_divergence`].

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
    plan = Execution.plan(student_hidden, student_head.weight, 2, memory_budget, kernel, head_gradient_bytes=0)
    student_finish, teacher_finish = (head.detached(plan.wide) for head in heads)
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
            See [`~trl_opsd.objective.fused_divergence`].

    Returns:
        `torch.Tensor` of shape `(N,)`, bool.
    """
    plan = Execution.plan(hidden, head.weight, 1, memory_budget, "eager", head_gradient_bytes=0)
    finish = head.detached(plan.wide)
    found = torch.empty(hidden.size(0), dtype=torch.bool, device=hidden.device)
    for place, (products,) in _products(plan, [hidden], [head]):
        logits = finish.logits(products)
        found[place] = (logits > logits.gather(1, token_ids[place].unsqueeze(1))).sum(dim=1) < k
    return found


@torch.no_grad()
def _products(
    plan: Execution, states: Sequence[torch.Tensor], heads: Sequence[Head]
) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """The products of hidden states and heads, a few rows at a time, and where these stand among all."""
    device, (block_rows, slice_rows) = states[0].device, plan.blocks
    blocks = [empty_block(block_rows, head.weight.size(0), plan.wide, device) for head in heads]
    with torch.autocast(device.type, enabled=False):
        for rows in slices(len(states[0]), block_rows):
            size = rows.stop - rows.start
            for hidden, head, block in zip(states, heads, blocks, strict=True):
                project(hidden[rows].to(plan.dtype), head.weight, block[:size], plan.dtype)
            for part in slices(size, slice_rows):
                place = slice(rows.start + part.start, rows.start + part.stop)
                yield place, [block[part] for block in blocks]


def _log_probs(
    plan: Execution, products: torch.Tensor, finish: Finish, token_ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if plan.kernel == "triton":
        from .triton_kernel import triton_token_log_probs

        return triton_token_log_probs(products, finish, token_ids, temperature)
    log_p, _, entropy = softmax(finish.logits(products), temperature)
    return log_p.gather(1, token_ids.unsqueeze(1)).squeeze(1), entropy
