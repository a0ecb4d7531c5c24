"""The divergence between student and teacher from hidden states, without ever holding their logits.

For each block of rows, both language-model heads are applied, the divergence and its gradient with respect to the
student's logits are computed, and the gradient is folded into those of the hidden states and of the head at once: four
vocabulary-sized matrix products, three when the head is frozen. The backward pass only scales what the forward pass
left.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .divergence import Divergence, expectation, pointwise_divergence


# Elements of one block of logits (16 MiB in fp32). About ten temporaries of this size are alive at once.
_BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Head:
    """
    A language-model head: logits = softcap(scale · (hidden · weightᵀ + bias)).

    Args:
        weight (`torch.Tensor` of shape `(V, H)`):
            Projection.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor on the logits (Cohere, Granite, Falcon-H1, ...).
        softcap (`float`, *optional*):
            Logits y become softcap · tanh(y / softcap) (Gemma).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        Logits of shape `(N, V)`, in fp32 or wider, of hidden states of shape `(N, H)`, multiplied in the weight's
        dtype.
        """
        logits = hidden.to(self.weight.dtype) @ self.weight.t()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


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
            Entropy of the student's distribution, in nats.
        teacher_entropy (`torch.Tensor`):
            Entropy of the teacher's distribution, in nats.
        student_log_prob (`torch.Tensor`):
            Log-probability of the sampled token under the student.
        teacher_log_prob (`torch.Tensor`):
            Log-probability of the sampled token under the teacher.
        clipped (`torch.Tensor`):
            1 where the clip lowered at least one vocabulary entry, else 0.
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
    clipped: torch.Tensor
    finite: torch.Tensor


def fused_divergence(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    token_ids: torch.Tensor,
    weights: torch.Tensor,
    divergence: Divergence,
    jsd_weight: float = 0.5,
    clip: float | None = None,
    temperature: float = 1.0,
    block_rows: int | None = None,
) -> FusedDivergence:
    """
    Weighted sum over tokens of the full-vocabulary divergence between teacher and student.

    Differentiable in `student_hidden` and in the student head's weight and bias. The teacher receives no gradient.
    Matrix products run in the autocast dtype, or else in the dtype of the head; everything elementwise and every
    accumulation in fp32 (fp64 for fp64 inputs).

    Args:
        student_hidden (`torch.Tensor` of shape `(N, H)`):
            Student hidden states, row n predicting token n.
        teacher_hidden (`torch.Tensor` of shape `(N, H_t)`):
            Teacher hidden states for the same tokens.
        student_head ([`Head`]):
            Student head, with V rows.
        teacher_head ([`Head`]):
            Teacher head, with V rows. It may share the student's tensors.
        token_ids (`torch.Tensor` of shape `(N,)`):
            Sampled tokens, int64. They only feed the log-probabilities of the result.
        weights (`torch.Tensor` of shape `(N,)`):
            Factor of each token's divergence in the loss.
        divergence (`str`):
            See [`pointwise_divergence`].
        jsd_weight (`float`, *optional*, defaults to `0.5`):
            See [`pointwise_divergence`].
        clip (`float`, *optional*):
            Upper bound τ on the entries before the sum over the vocabulary, Σ_v min(ℓ_v, τ), as in the released recipe
            of [Self-Distilled Reasoner](https://huggingface.co/papers/2601.18734).
        temperature (`float`, *optional*, defaults to `1.0`):
            Both sets of logits are divided by it. The loss is not multiplied by its square.
        block_rows (`int`, *optional*):
            Rows processed at once. `None` chooses by the size of the vocabulary.

    Returns:
        [`FusedDivergence`]: the loss and what the log needs, from the same pass.

    Raises:
        ValueError: If the two heads have different vocabularies.
    """
    vocabulary = student_head.weight.size(0)
    if teacher_head.weight.size(0) != vocabulary:
        raise ValueError(
            f"The teacher's vocabulary has {teacher_head.weight.size(0)} entries and the student's {vocabulary}. A "
            "divergence between them is undefined: use a teacher with the student's tokenizer."
        )
    block_rows = block_rows or max(1, _BLOCK_ELEMENTS // vocabulary)
    inputs: tuple[torch.Tensor | None, ...] = (student_hidden, student_head.weight, student_head.bias)
    if not torch.is_grad_enabled():  # inside the function grad mode is always off, and the gradients would be computed
        inputs = tuple(None if tensor is None else tensor.detach() for tensor in inputs)
    outputs = _FusedDivergenceFunction.apply(
        *inputs,
        student_head,
        teacher_hidden,
        teacher_head,
        token_ids,
        weights,
        (divergence, jsd_weight),
        clip,
        temperature,
        block_rows,
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
        teacher_hidden,
        teacher_head,
        token_ids,
        weights,
        divergence,
        clip,
        temperature,
        block_rows,
    ):
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        else:
            dtype = torch.promote_types(hidden.dtype, weight.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        weights = weights.to(wide)
        # Gradients are kept relative to the largest weight: fp16 would round small ones to 0 before a loss scale helps
        peak = weights.abs().max().clamp(min=torch.finfo(wide).tiny) if weights.numel() else weights.new_ones(())
        student_head = replace(student_head, weight=weight.to(dtype))
        teacher_head = replace(teacher_head, weight=teacher_head.weight.to(dtype))

        def gradient_buffer(index, like):
            return torch.zeros(like.shape, dtype=wide, device=like.device) if ctx.needs_input_grad[index] else None

        grad_hidden = gradient_buffer(0, hidden)
        grad_weight = gradient_buffer(1, weight)
        grad_bias = gradient_buffer(2, bias)
        per_token = torch.zeros(7, hidden.size(0), dtype=wide, device=hidden.device)

        with torch.autocast(device, enabled=False):
            for start in range(0, hidden.size(0), block_rows):
                rows = slice(start, start + block_rows)
                student_logits = student_head.logits(hidden[rows])
                teacher_logits = teacher_head.logits(teacher_hidden[rows])
                log_s = torch.log_softmax(student_logits / temperature, dim=-1)
                log_t = torch.log_softmax(teacher_logits / temperature, dim=-1)
                del teacher_logits

                entries, slopes = pointwise_divergence(log_s, log_t, *divergence)
                clipped = per_token.new_zeros(entries.size(0))
                if clip is not None:
                    above = entries > clip
                    entries = entries.clamp(max=clip)
                    slopes = slopes.masked_fill(above, 0.0)
                    clipped = above.any(dim=-1)
                p_s = log_s.exp()
                value = entries.sum(dim=-1)
                slope_sum = slopes.sum(dim=-1, keepdim=True)
                finite = torch.isfinite(value) & torch.isfinite(slope_sum.squeeze(-1))
                finite &= torch.isfinite(hidden[rows]).all(dim=-1)  # a softcap hides infinite ones
                target = token_ids[rows, None]
                per_token[:, rows] = torch.stack(
                    [
                        value.masked_fill(~finite, 0.0),
                        -expectation(p_s, log_s).sum(dim=-1),
                        -expectation(log_t.exp(), log_t).sum(dim=-1),
                        log_s.gather(1, target).squeeze(1),
                        log_t.gather(1, target).squeeze(1),
                        clipped.to(wide),
                        finite.to(wide),
                    ]
                )
                if grad_hidden is None and grad_weight is None and grad_bias is None:
                    continue

                # For log p = log_softmax(z): ∂/∂z_v = d_v − p_v Σ_u d_u
                grad = slopes.sub_(p_s.mul_(slope_sum)).mul_(weights[rows, None] / (peak * temperature))
                if student_head.softcap is not None:
                    grad *= 1 - (student_logits / student_head.softcap) ** 2
                grad *= student_head.scale
                grad.masked_fill_(~finite[:, None], 0.0)
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0)
                grad = grad.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad @ student_head.weight).to(wide)
                if grad_weight is not None:
                    block = hidden[rows].to(dtype).masked_fill(~finite[:, None], 0.0)
                    if dtype == wide:
                        grad_weight.addmm_(grad.t(), block)
                    else:
                        grad_weight += grad.t() @ block

        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(peak, grad_hidden, grad_weight, grad_bias)
        loss = (per_token[0] * weights).sum()
        outputs = per_token.unbind(0)
        ctx.mark_non_differentiable(*outputs)
        return loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        peak, *grads = ctx.saved_tensors
        grads = [
            None if grad is None else (grad * (grad_loss * peak)).to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return *grads, *[None] * 9
