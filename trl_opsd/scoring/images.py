"""Images beside the tokens of rows: apart for each row, since rows are shuffled and cut, and together for a pass."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from trl.trainer.utils import split_pixel_values_by_grid

from .heads import backbone_of, causal_lm


Images = dict[str, torch.Tensor]
"""What a processor makes of the images of a row, by name. Empty without any."""

IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "image_position_ids",
    "image_sizes",
    "pixel_attention_mask",
    "spatial_shapes",
)
"""The tensors that GRPOTrainer makes of images."""
OF_TOKENS = ("token_type_ids", "mm_token_type_ids")
"""Which tokens stand for images, by the names that models have for it."""


def images_apart(batch: dict[str, Any]) -> dict[str, Any]:
    """
    A batch whose images, which GRPOTrainer lays out in a way of each family of models, are apart for each row.

    Args:
        batch (`dict[str, Any]`):
            Generation batch, or the keyword arguments of a forward pass. `num_images` has the number of images of each
            row.

    Returns:
        `dict[str, Any]`: the same without those tensors, and with `images`, a list with [`Images`] of each row. What
        tells apart which tokens stand for images follows from the tokens.
    """
    rest = {name: value for name, value in batch.items() if name not in (*IMAGES, *OF_TOKENS)}
    if batch.get("pixel_values") is None or batch.get("num_images") is None:
        return rest
    # Tensors with rows of tiles have one row for each sample
    has_row_each = batch["pixel_values"].ndim == 5 and batch.get("pixel_attention_mask") is not None
    split = batch if has_row_each else split_pixel_values_by_grid({k: v for k, v in batch.items() if v is not None})
    images: list[Images] = []
    for row, number in enumerate(batch["num_images"]):
        values = {name: split[name] for name in IMAGES if split.get(name) is not None}
        its = {name: value[row] if isinstance(value, list) else value[row : row + 1] for name, value in values.items()}
        images.append(its if number else {})
    return {**rest, "images": images}


def images_together(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """
    A micro-batch whose images are laid out as GRPOTrainer reads them.

    Args:
        model (`nn.Module`):
            The model, not wrapped, or a `PeftModel` of one.
        inputs (`dict[str, Any]`):
            Micro-batch, from a batch with [`images_apart`].
    """
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    return {**inputs, **image_inputs(model, inputs.get("images"), ids)}


def joined_images(images: Sequence[Images]) -> Images:
    """The images of several rows, or of several parts of a row, one after another and padded to the largest."""
    names = dict.fromkeys(name for its in images for name in its)
    return {name: _joined([its[name] for its in images if name in its]) for name in names}


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    sizes = [max(lengths) for lengths in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [
            amount for size, is_now in zip(sizes, tensor.shape[1:], strict=True) for amount in (size - is_now, 0)
        ]
        padded.append(pad(tensor, missing[::-1]) if any(missing) else tensor)
    return torch.cat(padded)


def image_inputs(model: nn.Module, images: Sequence[Images] | None, input_ids: torch.Tensor) -> dict[str, Any]:
    """
    What a vision-language model reads beside the tokens of some rows.

    Args:
        model (`nn.Module`):
            The model, or a `PeftModel` of one.
        images (`Sequence[Images]`, *optional*):
            Images of each row, those of its prompt first.
        input_ids (`torch.Tensor` of shape `(B, P + T)`):
            Prompts and completions.

    Returns:
        `dict[str, Any]`: keyword arguments of a forward pass, none without images.
    """
    if images is None or not any(images):
        return {}
    config = causal_lm(model).config
    here = [{name: values.to(input_ids.device) for name, values in its.items()} for its in images]
    inputs: dict[str, Any] = joined_images(here)
    takes = inspect.signature(backbone_of(model).forward).parameters
    for name in (its for its in OF_TOKENS if its in takes):
        inputs[name] = (input_ids == config.image_token_id).long()
    return inputs


def places_tokens_itself(backbone: Any) -> bool:
    """Whether a backbone counts positions by its images, and not along the row."""
    return hasattr(backbone, "get_rope_index")
