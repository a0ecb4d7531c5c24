"""All elementwise work of the fused loss in torch: the reference, as it stands and under torch.compile."""

from typing import NamedTuple

import torch

from .divergence import bounded, expectation, pointwise_divergence, sampled_divergence
from .head import Finish
from .objective import Objective
from .support import restrict, spread, support_tokens


# What a kernel reports of each token, in this order. `FusedDivergence` says what they are.
STATISTICS = (
    "divergence",
    "student_entropy",
    "teacher_entropy",
    "student_log_prob",
    "teacher_log_prob",
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
    likelihood_factors: torch.Tensor | None,
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
            Factor of the gradient of each row's divergence.
        likelihood_factors (`torch.Tensor` of shape `(N,)`, *optional*):
            Factor of the gradient of −log p_S of each sampled token, which is added.
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
    log_s, p_s, entropy_s = softmax(student_logits, objective.temperature)
    log_t, p_t, entropy_t = softmax(teacher_logits, objective.temperature)
    target, bounds = token_ids.unsqueeze(1), (objective.ratio_low, objective.ratio_high)
    if objective.support == "sampled_token":
        support_s, support_t = log_s.gather(1, target), log_t.gather(1, target)
        support_t = bounded(support_s, support_t, *bounds)
        entries, slopes = sampled_divergence(support_s, support_t, objective.divergence, objective.jsd_weight)
    elif objective.support == "full":
        free_t, support_t = log_t, bounded(log_s, log_t, *bounds)
        entries, slopes = pointwise_divergence(
            log_s,
            support_t,
            objective.divergence,
            objective.jsd_weight,
            p_s=p_s,
            p_t=p_t if support_t is log_t else None,
        )
    else:
        tokens, kept = support_tokens(objective, student_logits, teacher_logits)
        support_s, free_t = (restrict(log_p, tokens, kept, objective) for log_p in (log_s, log_t))
        support_t = bounded(support_s, free_t, *bounds)
        entries, slopes = pointwise_divergence(support_s, support_t, objective.divergence, objective.jsd_weight)
    if objective.bounded == "ratio":
        slopes = torch.where(support_t == free_t, slopes, entries)
    value, slopes, slope_sum, clipped, clipped_mass = clip_and_sum(entries, slopes, objective.clip)
    log_prob = log_s.gather(1, target).squeeze(1)
    finite = valid & value.isfinite() & slope_sum.isfinite()
    if likelihood_factors is not None:
        finite &= log_prob.isfinite() | (likelihood_factors == 0)
    if objective.support == "sampled_token" and grad is not None:  # a ratio can be too large for half precision
        finite &= ((slopes * factors.unsqueeze(1)).abs() <= torch.finfo(grad.dtype).max).all(dim=-1)

    statistics = torch.stack(
        [
            torch.where(finite, value, 0.0),
            entropy_s,
            entropy_t,
            log_prob,
            log_t.gather(1, target).squeeze(1),
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
        logit_grad = logit_grad * factors.unsqueeze(1)
        if likelihood_factors is not None:
            pull = likelihood_factors.unsqueeze(1)
            logit_grad = (logit_grad + p_s * pull).scatter_add(1, target, -pull)
        logit_grad = student_finish.pull_back(logit_grad, student_logits)
        target_block = student_products if grad is None else grad
        target_block.copy_(torch.where(finite.unsqueeze(1), logit_grad, 0.0))
    return statistics


class Summed(NamedTuple):
    """
    Entries of a divergence after the clip, by rows.

    Args:
        value (`torch.Tensor` of shape `(N,)`):
            Their sum.
        slopes (`torch.Tensor` of shape `(N, K)`):
            Their slopes, 0 where the clip lowered an entry.
        slope_sum (`torch.Tensor` of shape `(N,)`):
            The sum of those.
        clipped (`torch.Tensor` of shape `(N,)`):
            1 where the clip lowered at least one entry, else 0.
        clipped_mass (`torch.Tensor` of shape `(N,)`):
            What it took off the sum.
    """

    value: torch.Tensor
    slopes: torch.Tensor
    slope_sum: torch.Tensor
    clipped: torch.Tensor
    clipped_mass: torch.Tensor


def clip_and_sum(entries: torch.Tensor, slopes: torch.Tensor, clip: float | None) -> Summed:
    """The sums of entries and slopes, each of shape `(N, K)`, with the entries bounded by `clip`."""
    clipped = clipped_mass = torch.zeros_like(entries[:, 0])
    if clip is not None:
        above = entries > clip
        clipped = above.any(dim=-1).to(entries.dtype)
        clipped_mass = torch.where(above, entries - clip, 0.0).sum(dim=-1)
        entries, slopes = entries.clamp(max=clip), torch.where(above, 0.0, slopes)
    return Summed(entries.sum(dim=-1), slopes, slopes.sum(dim=-1), clipped, clipped_mass)


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


def softmax(logits: torch.Tensor, temperature: float) -> Softmax:
    """
    softmax(logits / temperature) with all that is needed of it.

    Spelled out, so that each exponential is taken once. Besides, torch.compile takes a factor out of a softmax by a
    detour that costs more than the rest.
    """
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    if temperature != 1.0:
        shifted = shifted * (1 / temperature)
    exp = shifted.exp()
    total = exp.sum(dim=-1, keepdim=True)
    mean = expectation(exp, shifted).sum(dim=-1, keepdim=True) / total
    log_total = total.log()
    return Softmax(shifted - log_total, exp * total.reciprocal(), (log_total - mean).squeeze(1))
