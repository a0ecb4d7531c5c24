"""
All elementwise work of the fused loss in Triton, for GPUs. It computes what [`divergence_kernel`] does.

Over the full vocabulary it is one kernel. A top-k support is three smaller ones around a search: the normalisers (and
the maxima the search starts from); once the support's logits are put aside and replaced by −∞, the mass of all others;
and the gradient, a multiple of the softmax everywhere but in the support.
"""

import math
from typing import NamedTuple

import torch
import triton

from .divergence import bounded, canonical, pointwise_divergence, sampled_divergence
from .head import Finish
from .kernel import STATISTICS, clip_and_sum
from .objective import Objective
from .support import CHUNK, join, spread_inside, support_tokens
from .triton_kernels import full_kernel, normaliser_kernel, outside_kernel, scale_kernel, softmax_grad_kernel


_BLOCK = 2048
_WARPS = 8
_MODES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


def triton_divergence_kernel(
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
    Divergence of each row, its statistics and its gradient, as [`divergence_kernel`] in fp32.

    Args:
        student_products (`torch.Tensor` of shape `(N, V)`):
            See [`divergence_kernel`]. For a top-k support they are written over.
        teacher_products (`torch.Tensor` of shape `(N, V)`):
            Likewise.
        student_finish ([`Finish`]):
            See there.
        teacher_finish ([`Finish`]):
            See there.
        token_ids (`torch.Tensor` of shape `(N,)`):
            See there.
        factors (`torch.Tensor` of shape `(N,)`):
            See there.
        likelihood_factors (`torch.Tensor` of shape `(N,)`, *optional*):
            See there.
        valid (`torch.Tensor` of shape `(N,)`):
            See there.
        objective ([`Objective`]):
            See there.
        needs_grad (`bool`):
            See there.
        grad (`torch.Tensor` of shape `(N, V)`, *optional*):
            See there. A row of it may lie over the same row of `student_products`, from its start.

    Returns:
        `torch.Tensor` of shape `(len(STATISTICS), N)`.
    """
    grad = student_products if grad is None else grad
    if student_products.size(0) == 0:
        return student_products.new_zeros(len(STATISTICS), 0)
    arguments = (token_ids, factors, likelihood_factors, valid, objective, needs_grad, grad)
    kernel = _full if objective.support == "full" else _restricted
    return kernel(student_products, teacher_products, student_finish, teacher_finish, *arguments)


def _full(
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
    grad: torch.Tensor,
) -> torch.Tensor:
    num_rows, vocabulary = student_products.shape
    statistics = factors.new_empty(len(STATISTICS), num_rows)
    student, teacher = (
        _head_arguments(finish, products)
        for finish, products in ((student_finish, student_products), (teacher_finish, teacher_products))
    )
    full_kernel[(num_rows,)](
        student_products, teacher_products, grad, student.bias, teacher.bias,
        token_ids, factors, factors if likelihood_factors is None else likelihood_factors, valid,
        statistics, num_rows,
        student_products.stride(0), teacher_products.stride(0), grad.stride(0), vocabulary,
        student.scale, student.softcap, teacher.scale, teacher.softcap,
        1 / objective.temperature, objective.jsd_weight, objective.clip or 0.0,
        math.log(objective.ratio_low or 1.0), math.log(objective.ratio_high or 1.0),
        **{f"STUDENT_{name}": value for name, value in student.constants.items()},
        **{f"TEACHER_{name}": value for name, value in teacher.constants.items()},
        MODE=_MODES[canonical(objective.divergence, objective.jsd_weight)], CLIP=objective.clip is not None,
        RATIO_LOW=objective.ratio_low is not None, RATIO_HIGH=objective.ratio_high is not None,
        RATIO_IS_DATA=objective.bounded == "ratio",
        POINTWISE=any(its is not None for its in (objective.clip, objective.ratio_low, objective.ratio_high)),
        LIKELIHOOD=likelihood_factors is not None, NEEDS_GRAD=needs_grad, **_launch(vocabulary),
    )  # fmt: skip
    return statistics


def _restricted(
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
    grad: torch.Tensor,
) -> torch.Tensor:
    bounds = objective.ratio_low, objective.ratio_high
    on_sample = objective.support == "sampled_token"
    student = _Side(student_products, student_finish, token_ids, objective, "student")
    teacher = _Side(teacher_products, teacher_finish, token_ids, objective, "teacher")
    target = token_ids.unsqueeze(1)
    if on_sample:
        tokens = target
        support_s, support_t = (side.log_prob.unsqueeze(1) for side in (student, teacher))
        support_t = bounded(support_s, support_t, *bounds)
        entries, slopes = sampled_divergence(support_s, support_t, objective.divergence, objective.jsd_weight)
        logits = student.logits(tokens)
    else:
        tokens, kept = support_tokens(
            objective, student_products, teacher_products, student.chunk_maxima, teacher.chunk_maxima
        )
        logits = student.logits(tokens)
        log_p = student.log_p(logits)
        support_s = student.put_aside(tokens, kept, log_p)
        free_t = teacher.put_aside(tokens, kept, teacher.log_p(teacher.logits(tokens)))
        support_t = bounded(support_s, free_t, *bounds)
        entries, slopes = pointwise_divergence(support_s, support_t, objective.divergence, objective.jsd_weight)
        if objective.bounded == "ratio":
            slopes = torch.where(support_t == free_t, slopes, entries)
    summed = clip_and_sum(entries, slopes, objective.clip)
    finite = valid & summed.value.isfinite() & summed.slope_sum.isfinite()
    if on_sample:  # a ratio can be too large for half precision
        finite &= ((summed.slopes * factors.unsqueeze(1)).abs() <= torch.finfo(grad.dtype).max).all(dim=-1)
    if likelihood_factors is not None:
        finite &= student.log_prob.isfinite() | (likelihood_factors == 0)
    if needs_grad:
        factor = factors.unsqueeze(1)
        pull = torch.zeros_like(factor) if likelihood_factors is None else likelihood_factors.unsqueeze(1)
        bucket = log_bucket = torch.zeros_like(factor)
        if on_sample:
            inside, whole = summed.slopes * factor, -summed.slopes * factor
        else:
            inside, outside, total = spread_inside(summed.slopes, support_s, tokens.size(1))
            inside = inside * factor + torch.where(kept, log_p.exp() * pull, 0.0)
            whole = torch.zeros_like(factor)
            if outside is not None:
                bucket, log_bucket, whole = outside * factor, support_s[:, -1:], -total * factor
        student.write_softmax_grad(grad, whole + pull, bucket, log_bucket, finite)
        student.add_grad(grad, tokens, inside, logits, finite)
        if likelihood_factors is not None:
            student.add_grad(grad, target, -pull, student.token_logits, finite)
    return torch.stack(
        [
            torch.where(finite, summed.value, 0.0),
            student.entropy,
            teacher.entropy,
            student.log_prob,
            teacher.log_prob,
            torch.where(finite, summed.clipped, 0.0),
            torch.where(finite, summed.clipped_mass, 0.0),
            finite.to(factors.dtype),
        ]
    )


class _Side:
    """One side's products, of shape (N, V), and what the normalising kernel says of them."""

    def __init__(
        self, products: torch.Tensor, finish: Finish, token_ids: torch.Tensor, objective: Objective, name: str
    ):
        self._products, self._objective = products, objective
        searched = objective.support in (f"{name}_top_k", "union_top_k", "intersection_top_k")
        if objective.support != "sampled_token" and finish.bias is not None:  # a search compares sums, not products
            products.add_(finish.bias)
            finish = Finish(None, finish.scale, finish.softcap)
        self._finish = finish
        num_rows, vocabulary = products.shape
        self._head = _head_arguments(finish, products)
        self._arguments = {**self._head.constants, **_launch(vocabulary)}
        chunks = triton.cdiv(vocabulary, CHUNK)
        self.chunk_maxima = products.new_empty(num_rows, chunks) if searched else None
        self._normaliser = products.new_empty(4, num_rows)
        self.token_logits = self.logits(token_ids.unsqueeze(1))
        normaliser_kernel[(num_rows,)](
            products, self._head.bias, token_ids, products if self.chunk_maxima is None else self.chunk_maxima,
            self._normaliser, num_rows, products.stride(0), chunks, vocabulary,
            self._head.scale, self._head.softcap, 1 / objective.temperature,
            MAXIMA=searched, CHUNK=CHUNK, **self._arguments,
        )  # fmt: skip
        _, _, self.entropy, self.log_prob = self._normaliser

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        bias = self._finish.bias
        finish = Finish(None if bias is None else bias[tokens], self._finish.scale, self._finish.softcap)
        return finish.logits(self._products.gather(1, tokens))

    def log_p(self, logits: torch.Tensor) -> torch.Tensor:
        normaliser, reference, _, _ = self._normaliser.unsqueeze(2)
        return (logits - reference) / self._objective.temperature - normaliser

    def put_aside(self, tokens: torch.Tensor, kept: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        """The distribution over a support, see `restrict`. The support's products become −∞."""
        self._products.scatter_(1, tokens, -torch.inf)
        if self._objective.tail == "renormalize":
            return join(log_p, None, kept)
        num_rows, vocabulary = self._products.shape
        outside = self._products.new_empty(num_rows)
        outside_kernel[(num_rows,)](
            self._products, self._head.bias, self._normaliser, outside, num_rows, self._products.stride(0),
            vocabulary, self._head.scale, self._head.softcap, 1 / self._objective.temperature, **self._arguments,
        )  # fmt: skip
        return join(log_p, outside.unsqueeze(1), kept)

    def write_softmax_grad(
        self,
        grad: torch.Tensor,
        whole: torch.Tensor,
        bucket: torch.Tensor,
        log_bucket: torch.Tensor,
        finite: torch.Tensor,
    ) -> None:
        """grad = whole · p + bucket · p / p_bucket, with respect to the products that were not put aside."""
        num_rows, vocabulary = self._products.shape
        softmax_grad_kernel[(num_rows,)](
            self._products, grad, self._head.bias, self._normaliser, whole.contiguous(), bucket.contiguous(),
            log_bucket.contiguous(), finite, num_rows, self._products.stride(0), grad.stride(0), vocabulary,
            self._head.scale, self._head.softcap, 1 / self._objective.temperature, **self._arguments,
        )  # fmt: skip

    def add_grad(
        self,
        grad: torch.Tensor,
        tokens: torch.Tensor,
        logit_grad: torch.Tensor,
        logits: torch.Tensor,
        finite: torch.Tensor,
    ) -> None:
        """grad += a gradient with respect to some of the logits."""
        pulled = self._finish.pull_back(logit_grad, logits)
        grad.scatter_add_(1, tokens, torch.where(finite.unsqueeze(1), pulled, 0.0).to(grad.dtype))


class _HeadArguments(NamedTuple):
    # What the kernels take of a head. A tensor that is not read stands in for a bias that is not there
    bias: torch.Tensor
    scale: float
    softcap: float
    constants: dict[str, bool]


def _head_arguments(finish: Finish, products: torch.Tensor) -> _HeadArguments:
    return _HeadArguments(
        products if finish.bias is None else finish.bias,
        finish.scale,
        finish.softcap or 1.0,
        {"BIAS": finish.bias is not None, "SOFTCAP": finish.softcap is not None},
    )


def _launch(vocabulary: int) -> dict[str, int]:
    return {"BLOCK": min(_BLOCK, max(CHUNK, triton.next_power_of_2(vocabulary))), "num_warps": _WARPS}


def triton_token_log_probs(
    products: torch.Tensor, finish: Finish, token_ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of tokens and entropies, from the products of hidden states and head weight.

    Args:
        products (`torch.Tensor` of shape `(N, V)`):
            Products, fp32.
        finish ([`Finish`]):
            The rest of the head.
        token_ids (`torch.Tensor` of shape `(N,)`):
            Tokens.
        temperature (`float`):
            Temperature.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: both in nats, of shape `(N,)`, fp32.
    """
    side = _Side(products, finish, token_ids, Objective(support="sampled_token", temperature=temperature), "student")
    return side.log_prob, side.entropy


def scale(tensor: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """
    out = tensor · factor. In place it costs nothing where the factor is 1, which the device finds out by itself.

    Args:
        tensor (`torch.Tensor`):
            Contiguous, of any shape, fp32.
        factor (`torch.Tensor`):
            Scalar, fp32.
        out (`torch.Tensor`):
            Result, of the same shape and any dtype. It may be `tensor`.

    Returns:
        `torch.Tensor`: `out`.
    """
    if tensor.numel():
        grid = (triton.cdiv(tensor.numel(), _BLOCK),)
        scale_kernel[grid](tensor, out, factor, tensor.numel(), IN_PLACE=out is tensor, BLOCK=_BLOCK)
    return out


def smoke_test(device: torch.device) -> None:
    """
    Run the kernels on a few numbers.

    Args:
        device (`torch.device`):
            Where.

    Raises:
        Exception: Whatever Triton raises where it cannot compile or launch.
    """
    for support in ("full", "teacher_top_k"):
        student, teacher = (torch.zeros(1, 8, device=device) for _ in range(2))
        tokens, ones = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, device=device)
        objective, finish = Objective(support=support, top_k=2), Finish(None, 1.0, None)
        triton_divergence_kernel(
            student, teacher, finish, finish, tokens, ones, None, ones.bool(), objective, True, None
        )
