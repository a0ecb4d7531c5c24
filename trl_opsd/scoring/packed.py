"""Reading rows without their padding: one after another, as a single row in which none sees another."""

from typing import Any

import torch
from torch.nn.functional import pad
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layers import remembers_keys_and_values_only
from .positions import positions


def can_pack(model: Any) -> bool:
    """
    Whether a causal language model reads rows that follow one another in one row as it reads them apart, without
    paying for attention between them.

    That takes flash attention, of any version and from any package, which is told where each row begins; a model that
    hands this on to every layer, as those do that transformers lets other engines run; and layers that carry nothing
    from one row into the next. The other attention implementations would be handed a mask of all tokens by all tokens.
    """
    return (
        ALL_ATTENTION_FUNCTIONS.get(model.config._attn_implementation) is flash_attention_forward
        and model._supports_attention_backend
        and remembers_keys_and_values_only(model)
    )


def packed_states(
    backbone: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, selected: torch.Tensor
) -> torch.Tensor:
    """
    Hidden states that predict the selected completion tokens, from a pass in which no row is padded.

    Args:
        backbone (`nn.Module`):
            Transformer without its head, of a model for which [`can_pack`] holds.
        input_ids (`torch.Tensor` of shape `(B, P + T)`):
            Left-padded prompts and right-padded completions.
        attention_mask (`torch.Tensor` of shape `(B, P + T)`):
            1 for tokens, 0 for padding.
        selected (`torch.Tensor` of shape `(B, T)`, bool):
            The completion tokens.

    Returns:
        `torch.Tensor` of shape `(number of selected tokens, H)`, row by row.
    """
    is_token = attention_mask.bool()
    predicts = torch.zeros_like(is_token)
    predicts[:, -selected.size(1) - 1 : -1] = selected
    lengths = is_token.sum(dim=1)
    boundaries = pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max())
    # Positions tell rows apart too, by a search in every layer; that is what models do that leave the boundaries out
    states = backbone(
        input_ids=input_ids[is_token][None],
        position_ids=positions(attention_mask)[is_token][None],
        cu_seq_lens_q=boundaries,
        cu_seq_lens_k=boundaries,
        max_length_q=longest,
        max_length_k=longest,
        use_cache=False,
    ).last_hidden_state[0]
    return states[predicts[is_token]]
