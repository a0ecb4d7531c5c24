"""
The generalized Jensen-Shannon divergence on whole logit tensors: the plain formula, for reference and for small
inputs.
"""

import torch

from .divergence import pointwise_divergence


def generalized_jsd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    Generalized Jensen-Shannon divergence, Eq. (1) of [GKD](https://huggingface.co/papers/2306.13649), with the
    signature and the values of [`~trl.experimental.gkd.GKDTrainer.generalized_jsd_loss`].

    Differentiable through both arguments. It holds several `(B, T, V)` tensors at once; training uses
    [`fused_divergence`], which holds none.

    Args:
        student_logits (`torch.Tensor` of shape `(B, T, V)`):
            Student logits.
        teacher_logits (`torch.Tensor` of shape `(B, T, V)`):
            Teacher logits.
        labels (`torch.Tensor` of shape `(B, T)`, *optional*):
            Positions labelled -100 are left out.
        beta (`float`, *optional*, defaults to `0.5`):
            Interpolation coefficient β: 0 is KL(teacher ‖ student), 1 is KL(student ‖ teacher).
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature both sets of logits are divided by.
        reduction (`str`, *optional*, defaults to `"batchmean"`):
            `"batchmean"` (sum over the tokens kept, divided by their number; by B if `labels` is `None`), `"sum"`,
            `"mean"` (over all entries) or `"none"`.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            If given, the result is the sum divided by this number, whatever `reduction` says.

    Returns:
        `torch.Tensor`: a scalar, or with `reduction="none"` the entries: `(B, T, V)`, or `(number of tokens kept, V)`
        with `labels`.
    """
    log_s = torch.log_softmax(student_logits / temperature, dim=-1)
    log_t = torch.log_softmax(teacher_logits / temperature, dim=-1)
    entries, _ = pointwise_divergence(log_s, log_t, "jsd", beta)
    if labels is not None:
        entries = entries[labels != -100]
    if num_items_in_batch is not None:
        return entries.sum() / num_items_in_batch
    if reduction == "batchmean":
        return entries.sum() / max(entries.size(0), 1)
    if reduction == "sum":
        return entries.sum()
    if reduction == "mean":
        return entries.mean()
    return entries
