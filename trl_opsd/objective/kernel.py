"""All elementwise work of the fused loss, written once. It runs as it stands and under torch.compile."""

from typing import NamedTuple

import torch

from .divergence import expectation, pointwise_divergence, sampled_divergence
from .head import Finish
from .objective import Objective
from .support import chunk_maxima, restrict, select_support, spread, top_k_tokens


# What the kernel reports of each token, in this order. `FusedDivergence` says what they are.
STATISTICS = (
    "divergence",
    "student_entropy",
    "teacher_entropy",
    "student_log_prob",
    "teacher_log_prob",
    "top_k_overlap",
    "top_k_mass",
    "clipped",
    "clipped_mass",
    "finite",
)


def divergence_kernel(
    student_products: torch.Tensor,
    teacher_products: torch.Tensor,
    student_finish: Finish,
    teacher_finish: Finish,
    token_ids: torch.Tensor,
    factors: torch.Tensor,
    valid: torch.Tensor,
    objective: Objective,
    needs_grad: bool,
    grad: torch.Tensor | None,
) -> torch.Tensor:
    """
    Divergence of each row, its statistics and its gradient.

    Args:
        student_products (`torch.Tensor` of shape `(N, V)`):
            Products of the student's hidden states and head weight, fp32 or fp64.
        teacher_products (`torch.Tensor` of shape `(N, V)`):
            The teacher's.
        student_finish ([`Finish`]):
            The rest of the student's head.
        teacher_finish ([`Finish`]):
            The rest of the teacher's head.
        token_ids (`torch.Tensor` of shape `(N,)`):
            Sampled tokens.
        factors (`torch.Tensor` of shape `(N,)`):
            Factor of each row's gradient.
        valid (`torch.Tensor` of shape `(N,)`):
            False for rows whose hidden states are not finite.
        objective ([`Objective`]):
            What to compute.
        needs_grad (`bool`):
            Whether to compute the gradient with respect to the student's products (plus bias).
        grad (`torch.Tensor` of shape `(N, V)`, *optional*):
            Where it is written. `None` writes over `student_products`.

    Returns:
        `torch.Tensor` of shape `(len(STATISTICS), N)`.
    """
    student_logits = student_finish.logits(student_products)
    teacher_logits = teacher_finish.logits(teacher_products)
    maxima_s, maxima_t = chunk_maxima(student_logits), chunk_maxima(teacher_logits)
    log_s, p_s, entropy_s = softmax(student_logits, maxima_s.amax(dim=-1, keepdim=True), objective.temperature)
    log_t, p_t, entropy_t = softmax(teacher_logits, maxima_t.amax(dim=-1, keepdim=True), objective.temperature)
    target = token_ids.unsqueeze(1)

    top_k = min(objective.top_k, log_s.size(1))
    student_top, teacher_top = top_k_tokens((student_logits, teacher_logits), (maxima_s, maxima_t), top_k)
    if objective.support == "sampled_token":
        support_s, support_t = log_s.gather(1, target), log_t.gather(1, target)
        entries, slopes = sampled_divergence(support_s, support_t, objective.divergence, objective.jsd_weight)
    elif objective.support == "full":
        entries, slopes = pointwise_divergence(
            log_s, log_t, objective.divergence, objective.jsd_weight, p_s=p_s, p_t=p_t
        )
    else:
        tokens, kept = select_support(objective, student_top, teacher_top)
        support_s, support_t = (restrict(log_p, tokens, kept, objective) for log_p in (log_s, log_t))
        entries, slopes = pointwise_divergence(support_s, support_t, objective.divergence, objective.jsd_weight)
    clipped = clipped_mass = torch.zeros_like(factors)
    if objective.clip is not None:
        above = entries > objective.clip
        clipped = above.any(dim=-1).to(entries.dtype)
        clipped_mass = torch.where(above, entries - objective.clip, 0.0).sum(dim=-1)
        entries, slopes = entries.clamp(max=objective.clip), torch.where(above, 0.0, slopes)
    value, slope_sum = entries.sum(dim=-1), slopes.sum(dim=-1)
    finite = valid & value.isfinite() & slope_sum.isfinite()
    if objective.support == "sampled_token" and grad is not None:  # a ratio can be too large for half precision
        finite &= ((slopes * factors.unsqueeze(1)).abs() <= torch.finfo(grad.dtype).max).all(dim=-1)

    statistics = torch.stack(
        [
            torch.where(finite, value, 0.0),
            entropy_s,
            entropy_t,
            log_s.gather(1, target).squeeze(1),
            log_t.gather(1, target).squeeze(1),
            (student_top.unsqueeze(2) == teacher_top.unsqueeze(1)).sum(dim=(1, 2)).to(value.dtype) / top_k,
            p_s.gather(1, teacher_top).sum(dim=-1),
            torch.where(finite, clipped, 0.0),
            torch.where(finite, clipped_mass, 0.0),
            finite.to(value.dtype),
        ]
    )
    if needs_grad:
        # For log p = log_softmax(z): ∂/∂z_v = d_v − p_v Σ_u d_u
        if objective.support == "full":
            logit_grad = slopes - p_s * slope_sum.unsqueeze(1)
        elif objective.support == "sampled_token":
            logit_grad = (-p_s * slopes).scatter_add(1, target, slopes)
        else:
            logit_grad = spread(slopes, log_s, support_s, tokens, objective)
        logit_grad = student_finish.pull_back(logit_grad, student_logits) * factors.unsqueeze(1)
        target_block = student_products if grad is None else grad
        target_block.copy_(torch.where(finite.unsqueeze(1), logit_grad, 0.0))
    return statistics


class Softmax(NamedTuple):
    """
    A distribution over the vocabulary, by rows.

    Args:
        log_p (`torch.Tensor` of shape `(N, V)`):
            Log-probabilities.
        p (`torch.Tensor` of shape `(N, V)`):
            Probabilities.
        entropy (`torch.Tensor` of shape `(N,)`):
            Entropy, in nats.
    """

    log_p: torch.Tensor
    p: torch.Tensor
    entropy: torch.Tensor


def softmax(logits: torch.Tensor, maximum: torch.Tensor, temperature: float) -> Softmax:
    """
    softmax(logits / temperature) with all that is needed of it, given the maximum of each row.

    Spelled out, so that each exponential is taken once. Besides, torch.compile takes a factor out of a softmax by a
    detour that costs more than the rest.
    """
    shifted = logits - maximum
    if temperature != 1.0:
        shifted = shifted * (1 / temperature)
    exp = shifted.exp()
    total = exp.sum(dim=-1, keepdim=True)
    mean = expectation(exp, shifted).sum(dim=-1, keepdim=True) / total
    log_total = total.log()
    return Softmax(shifted - log_total, exp * total.reciprocal(), (log_total - mean).squeeze(1))
