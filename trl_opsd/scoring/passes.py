"""Which rows and columns of a batch go through the network together."""

import math
from typing import Any

import torch
from trl.trainer.utils import split_tensor_dict


def keep_groups_together(batches: list[dict[str, Any]], window: int, key: str) -> list[dict[str, Any]]:
    """
    Reorder the rows of every `window` consecutive micro-batches so that those with the same number under `key` are
    adjacent.

    Args:
        batches (`list[dict[str, Any]]`):
            Micro-batches of equal size: tensors with one row per sample, and scalars.
        window (`int`):
            Number of micro-batches whose rows may change places. It divides their number.
        key (`str`):
            Name of the tensor that numbers the groups.

    Returns:
        `list[dict[str, Any]]`: as many micro-batches, of the same size. Groups are in the order of their first rows,
        and their rows in the order they had.
    """
    regrouped = []
    for start in range(0, len(batches), window):
        part = batches[start : start + window]
        groups = torch.cat([batch[key] for batch in part]).tolist()
        order = torch.tensor(sorted(range(len(groups)), key=lambda row: groups.index(groups[row])))
        merged = {
            name: value if value is None or value.ndim == 0 else torch.cat([batch[name] for batch in part])[order]
            for name, value in part[0].items()
        }
        regrouped += split_tensor_dict(merged, len(part))
    return regrouped


def cut_by_tokens(
    prompt_lengths: list[int],
    completion_lengths: list[int],
    groups: list[int],
    max_tokens: int,
    padded: bool = True,
) -> list[list[int]]:
    """
    Cut rows into passes of at most `max_tokens` tokens.

    Rows are sorted by length, groups by their longest row, so that little is padded and groups stay together.

    Args:
        prompt_lengths (`list[int]`):
            Tokens of each row's prompt.
        completion_lengths (`list[int]`):
            Tokens of each row's completion.
        groups (`list[int]`):
            The same number for rows with the same prompt.
        max_tokens (`int`):
            Most tokens of a pass. A longer row gets a pass of its own.
        padded (`bool`, *optional*, defaults to `True`):
            Whether a pass has rows × (longest prompt + longest completion) tokens, or only those of its rows.

    Returns:
        `list[list[int]]`: the indices of the rows of each pass.
    """
    lengths = [prompt + completion for prompt, completion in zip(prompt_lengths, completion_lengths, strict=True)]
    longest: dict[int, int] = {}
    for group, length in zip(groups, lengths, strict=True):
        longest[group] = max(length, longest.get(group, 0))
    order = sorted(
        range(len(lengths)), key=lambda row: (longest[groups[row]], groups[row], lengths[row]), reverse=True
    )
    passes: list[list[int]] = []
    for row in order:
        rows = [*passes[-1], row] if passes else [row]
        if padded:
            width = max(prompt_lengths[r] for r in rows) + max(completion_lengths[r] for r in rows)
            num_tokens = len(rows) * width
        else:
            num_tokens = sum(lengths[r] for r in rows)
        if passes and num_tokens <= max_tokens:
            passes[-1] = rows
        else:
            passes.append([row])
    return passes


def cut_into(passes: list[list[int]], number: int) -> list[list[int]]:
    """Halve the passes with the most rows until there are `number` of them, as far as there are rows."""
    passes = list(passes)
    while 0 < len(passes) < number:
        largest = max(range(len(passes)), key=lambda index: len(passes[index]))
        rows = passes[largest]
        if len(rows) == 1:
            break
        middle = len(rows) // 2
        passes[largest : largest + 1] = [rows[:middle], rows[middle:]]
    return passes


def padded_length(length: int, multiple_of: int | None) -> int:
    """Columns for a sequence: at least one, and a multiple of `pad_to_multiple_of`."""
    return math.ceil(max(length, 1) / (multiple_of or 1)) * (multiple_of or 1)


def used_width(mask: torch.Tensor, padding_side: str, multiple_of: int | None) -> int:
    """Columns of a padded batch that are needed for the tokens it holds."""
    used = mask.any(dim=0)
    if padding_side == "left":
        used = used.flip(0)
    columns = used.nonzero()
    return padded_length(int(columns[-1]) + 1 if len(columns) else 0, multiple_of)


def rows_of(inputs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some rows of a micro-batch. What is neither a tensor nor a list of rows belongs to all of them."""

    def some(value: Any) -> Any:
        if isinstance(value, list):
            return [value[row] for row in rows]
        return value[rows] if isinstance(value, torch.Tensor) and value.ndim > 0 else value

    return {name: some(value) for name, value in inputs.items()}


def idle_row(inputs: dict[str, Any]) -> dict[str, Any]:
    """The shortest row of a micro-batch, with no token of it in the loss."""
    lengths = inputs["prompt_mask"].sum(1) + inputs["completion_mask"].sum(1)
    row = rows_of(inputs, [int(lengths.argmin())])
    nothing = torch.zeros_like(row["student_mask"])
    masks = ("student_mask", "divergence_mask", "likelihood_mask", "tool_mask")
    return {**row, **dict.fromkeys(masks, nothing)}
