"""Where the tokens of a padded row are."""

import torch


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions counted from the first token of each row. Without them, left padding would shift the tokens."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
