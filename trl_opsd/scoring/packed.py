"""Reading rows without their padding: one after another, as a single row in which none sees another."""

from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layers import remembers_keys_and_values_only
from .positions import positions
from .shared_prefix import distinct_prompts


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
    lengths = is_token.sum(dim=1)
    states = _read(backbone, input_ids[is_token], positions(attention_mask)[is_token], lengths, lengths)
    return states[_predicts(selected, is_token)[is_token]]


def packed_states_with_shared_prompts(
    backbone: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    selected: torch.Tensor,
    groups: torch.Tensor,
) -> torch.Tensor:
    """
    As [`packed_states`], with each distinct prompt read once: the completions attend to its keys and values.

    Args:
        backbone (`nn.Module`):
            Transformer without its head, in evaluation mode, of a model for which [`can_pack`] and
            [`can_share_prompts`] hold.
        input_ids (`torch.Tensor` of shape `(B, P + T)`):
            Left-padded prompts and right-padded completions.
        attention_mask (`torch.Tensor` of shape `(B, P + T)`):
            1 for tokens, 0 for padding.
        selected (`torch.Tensor` of shape `(B, T)`, bool):
            The completion tokens.
        groups (`torch.Tensor` of shape `(B,)`):
            The same number for rows with the same prompt.

    Returns:
        `torch.Tensor` of shape `(number of selected tokens, H)`, row by row.
    """
    completion = slice(-selected.size(1), None)
    prompt = slice(None, -selected.size(1))
    first_rows, prompt_of_row = distinct_prompts(groups)
    is_token = attention_mask != 0
    is_token[0, completion.start] = True  # completions may all be empty, and a pass has to read something
    position_ids = positions(attention_mask)
    in_prompt, in_completion = is_token[first_rows, prompt], is_token[:, completion]

    cache = DynamicCache()  # keeps what has left a sliding window, which flash attention applies by itself
    prompt_states = _read(
        backbone,
        input_ids[first_rows, prompt][in_prompt],
        position_ids[first_rows, prompt][in_prompt],
        in_prompt.sum(dim=1),
        in_prompt.sum(dim=1),
        cache,
    )
    # Where the tokens of each row, one after another, are among those of all prompts and then all completions
    places = torch.cat([_numbered(in_prompt)[prompt_of_row], len(prompt_states) + _numbered(in_completion)], dim=1)[
        is_token
    ]
    for layer in cache.layers:
        layer.update = partial(_of_each_row, layer, places)
    completion_states = _read(
        backbone,
        input_ids[:, completion][in_completion],
        position_ids[:, completion][in_completion],
        in_completion.sum(dim=1),
        is_token.sum(dim=1),
        cache,
    )
    return torch.cat([prompt_states, completion_states])[places[_predicts(selected, is_token)[is_token]]]


def _read(
    backbone: Any,
    token_ids: torch.Tensor,
    position_ids: torch.Tensor,
    num_queries: torch.Tensor,
    num_keys: torch.Tensor,
    cache: DynamicCache | None = None,
) -> torch.Tensor:
    """The states of tokens, given how many of them each row has, and how many keys these attend to."""
    # Without the boundaries, every layer would search for them in the positions
    queries, keys = (pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0)) for lengths in (num_queries, num_keys))
    return backbone(
        input_ids=token_ids[None],
        position_ids=position_ids[None],
        cu_seq_lens_q=queries,
        cu_seq_lens_k=keys,
        max_length_q=int(num_queries.max()),
        max_length_k=int(num_keys.max()),
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state[0]


def _predicts(selected: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """Which tokens of the rows come before a selected one."""
    predicts = torch.zeros_like(is_token)
    predicts[:, -selected.size(1) - 1 : -1] = selected
    return predicts


def _numbered(is_token: torch.Tensor) -> torch.Tensor:
    """The tokens of padded rows, counted from 0 on, row by row."""
    return is_token.flatten().cumsum(dim=0).view_as(is_token) - 1


def _of_each_row(
    layer: DynamicLayer, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    # In place of `update`, which would keep what it returns: the prompts repeated for each row, in every layer at once
    return (
        torch.cat([layer.keys, keys], dim=-2)[:, :, places],
        torch.cat([layer.values, values], dim=-2)[:, :, places],
    )
