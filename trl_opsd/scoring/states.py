"""The hidden states that predict a completion."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .heads import backbone_of
from .images import Images, image_inputs, places_tokens_itself
from .packed import packed_states
from .positions import positions
from .shared_prefix import states_with_shared_prompts


def completion_states(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    selected: torch.Tensor,
    shared_groups: torch.Tensor | None = None,
    pack: bool = False,
    images: Sequence[Images] | None = None,
) -> torch.Tensor:
    """
    Hidden states that predict the selected completion tokens.

    Args:
        model (`nn.Module`):
            Causal language model, or a `PeftModel` of one. Its head is not run.
        input_ids (`torch.Tensor` of shape `(B, P + T)`):
            Left-padded prompts and right-padded completions.
        attention_mask (`torch.Tensor` of shape `(B, P + T)`):
            1 for tokens, 0 for padding.
        selected (`torch.Tensor` of shape `(B, T)`, bool):
            The completion tokens.
        shared_groups (`torch.Tensor` of shape `(B,)`, *optional*):
            The same number for rows with the same prompt, which is then read once.
        pack (`bool`, *optional*, defaults to `False`):
            Whether rows that share no prompt are read without padding, for which the model has to be one that
            [`can_pack`].
        images (`Sequence[Images]`, *optional*):
            Images of each row, see [`image_inputs`].

    Returns:
        `torch.Tensor` of shape `(number of selected tokens, H)`, row by row.
    """
    backbone = backbone_of(model)
    width = selected.size(1)
    if shared_groups is not None:
        return states_with_shared_prompts(backbone, input_ids, attention_mask, width, shared_groups)[selected]
    if pack:
        return packed_states(backbone, input_ids, attention_mask, selected)
    inputs = image_inputs(model, images, input_ids)
    if not inputs or not places_tokens_itself(backbone):
        inputs["position_ids"] = positions(attention_mask)
    states = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs).last_hidden_state
    return states[:, -width - 1 : -1][selected]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; after, each of its modules is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.__dict__["training"] = False  # a module's attributes take long to set, and there are thousands
    try:
        yield
    finally:
        for module in training:
            module.__dict__["training"] = True
