"""From token losses to one number: the aggregations GRPOConfig calls `loss_type`."""

import torch


_AGGREGATIONS = {
    "grpo": "sequence_mean",
    "sapo": "sequence_mean",
    "luspo": "sequence_sum",
    "dr_grpo": "constant",
    "bnpo": "local_mean",
    "dapo": "global_mean",
    "cispo": "global_mean",
    "vespo": "global_mean",
}


def aggregation_weights(
    mask: torch.Tensor, loss_type: str, num_rows: torch.Tensor, num_tokens: torch.Tensor, max_completion_length: int
) -> torch.Tensor:
    """
    Weight of each token, so that Σ weights · token loss is the loss aggregated as `loss_type` says.

    The weights are those GRPOTrainer applies, before its division by the number of accumulated micro-batches, but for
    sequences whose mask is all zero, which do not count: a mean is one over what takes part. Its normaliser is that of
    the whole batch, so that how it is split into micro-batches changes nothing.

    Args:
        mask (`torch.Tensor` of shape `(B, T)`):
            1 for the tokens that take part in the loss, else 0.
        loss_type (`str`):
            `"grpo"`, `"sapo"`: mean over sequences of their token means, the paper's choice for
            [OPSD](https://huggingface.co/papers/2601.18734). `"luspo"`: mean over sequences of their token sums.
            `"dr_grpo"`: the sum divided by `num_rows` · `max_completion_length`. `"bnpo"`: mean over the tokens of
            this batch. `"dapo"`, `"cispo"`, `"vespo"`: the sum divided by `num_tokens`.
        num_rows (`torch.Tensor`):
            Positive scalar, the normaliser of means over sequences: the number of those that take part across
            processes and accumulated micro-batches, divided by the numbers of both.
        num_tokens (`torch.Tensor`):
            Positive scalar, the normaliser of `"dapo"`: the number of tokens, likewise.
        max_completion_length (`int`):
            The normaliser of `"dr_grpo"`.

    Returns:
        `torch.Tensor` of shape `(B, T)`, fp32.

    Raises:
        ValueError: If `loss_type` is unknown.
    """
    if loss_type not in _AGGREGATIONS:
        raise ValueError(f"`loss_type` must be one of {sorted(_AGGREGATIONS)}, got {loss_type!r}.")
    mask = mask.float()
    aggregation = _AGGREGATIONS[loss_type]
    if aggregation == "sequence_mean":
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1.0) / num_rows
    if aggregation == "sequence_sum":
        return mask / num_rows
    if aggregation == "constant":
        return mask / (num_rows * max_completion_length)
    if aggregation == "local_mean":
        return mask / mask.sum().clamp(min=1.0)
    return mask / num_tokens


def share_of_rows(mask: torch.Tensor, whole_mask: torch.Tensor, loss_type: str) -> torch.Tensor:
    """
    What the loss of some rows is multiplied by, so that those of all rows of a micro-batch add up to its own.

    Args:
        mask (`torch.Tensor` of shape `(b, T)`):
            1 for the tokens of these rows that take part in the loss, else 0.
        whole_mask (`torch.Tensor` of shape `(B, T)`):
            The same for all rows.
        loss_type (`str`):
            See [`aggregation_weights`].

    Returns:
        `torch.Tensor`: scalar. 1 where the normaliser is not that of the rows at hand.
    """
    aggregation = _AGGREGATIONS[loss_type]
    if aggregation == "global_mean":
        return torch.ones((), device=mask.device)
    if aggregation == "local_mean":
        return mask.sum().clamp(min=1) / whole_mask.sum().clamp(min=1)
    return torch.tensor(mask.size(0) / whole_mask.size(0), device=mask.device)
