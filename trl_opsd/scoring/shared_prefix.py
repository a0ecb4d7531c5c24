"""Scoring the rollouts of one prompt without reading that prompt once for each of them."""

import inspect
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .heads import backbone_of
from .layers import remembers_keys_and_values_only
from .positions import positions


# Tokens saved × parameters of a layer: 3,584 × 1024 · (4 · 1024 + 3 · 3072)
_GPU_BREAK_EVEN = 4.9e10


def can_share_prompts(model: Any) -> bool:
    """
    Whether all that a causal language model remembers of a prompt is keys and values, which several rows can read.

    A rotary embedding that is rescaled once a sequence is long enough gives the same prompt other keys in one row than
    in another.
    """
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    rope_types = {entry.get("rope_type") for entry in (rope, *rope.values()) if isinstance(entry, dict)}
    return (
        remembers_keys_and_values_only(model)
        and "past_key_values" in inspect.signature(backbone_of(model).forward).parameters
        and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers
        )
        and not rope_types & {"dynamic", "longrope"}
    )


def pays_off(num_tokens: int, num_tokens_shared: int, config: Any = None) -> bool:
    """
    Whether reading each prompt once is faster, by the tokens that the backbone then processes.

    Args:
        num_tokens (`int`):
            Tokens of whole sequences, and of their padding if they are padded.
        num_tokens_shared (`int`):
            Tokens with each distinct prompt read once, padding included.
        config ([`~transformers.PreTrainedConfig`], *optional*):
            Of the model, on a GPU. `None` on a CPU.

    On SmolLM2-135M's shape (CPU, fp32; prompts of 32 to 2,048 tokens, completions of 32 to 512, 2 to 8 rollouts) the
    time followed the number of tokens: 0.16 × for 8 rollouts of 256 tokens after 2,048, 0.60 × for 2 of 128 after 512,
    0.9 to 1.0 × where less than a tenth is saved, up to 1.1 × where fewer than 128 are, as a second pass is not free.
    Packed rows hold no padding, which shared ones do: after a prompt of P tokens, G rollouts of c tokens in the mean
    and of T at most are P + G·T tokens with a shared prompt and G·(P + c) in packed rows, so that sharing reads less
    where (G - 1)·P > G·(T - c). A token costs about the same in both: on three layers of that shape (time of one CPU
    thread, each row attended by itself), sharing and packing took 0.42 and 0.58 of the time of padded rows for 8
    rollouts of 32 to 512 tokens after 512, 0.25 and 0.63 for 4 of 16 to 512 after 2,048, 0.78 and 0.46 for 8 of 32 to
    512 after 64.
    On a GPU a second pass costs the launches of each layer, whatever its size: on Qwen3-0.6B's shape (H100, bf16) both
    ways took as long where 3,584 of 8,192 tokens are saved. What is saved goes with the size of a layer.
    """
    saved = num_tokens - num_tokens_shared
    least = 128.0
    if config is not None:
        layer_size = config.hidden_size * (4 * config.hidden_size + 3 * getattr(config, "intermediate_size", 0))
        least = max(least, _GPU_BREAK_EVEN / layer_size)
    return saved >= least and saved >= 0.1 * num_tokens


def states_with_shared_prompts(
    backbone: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_width: int, groups: torch.Tensor
) -> torch.Tensor:
    """
    Hidden states that predict the completion tokens. Each distinct prompt goes through the backbone once, and the
    completions attend to its keys and values.

    Args:
        backbone (`nn.Module`):
            Transformer without its head, in evaluation mode, of a model for which [`can_share_prompts`] holds.
        input_ids (`torch.Tensor` of shape `(B, P + T)`):
            Left-padded prompts and right-padded completions.
        attention_mask (`torch.Tensor` of shape `(B, P + T)`):
            1 for tokens, 0 for padding.
        completion_width (`int`):
            T.
        groups (`torch.Tensor` of shape `(B,)`):
            The same number for rows with the same prompt.

    Returns:
        `torch.Tensor` of shape `(B, T, H)`: the state one token before each completion token.
    """
    numbers = groups.tolist()
    position = {number: index for index, number in enumerate(dict.fromkeys(numbers))}
    first_rows = [numbers.index(number) for number in position]
    prompt_of_row = torch.tensor([position[number] for number in numbers], device=input_ids.device)
    position_ids = positions(attention_mask)
    prompt, completion = slice(None, -completion_width), slice(-completion_width, None)

    cache = DynamicCache(config=backbone.config)
    prompt_states = backbone(
        input_ids=input_ids[first_rows, prompt],
        attention_mask=attention_mask[first_rows, prompt],
        position_ids=position_ids[first_rows, prompt],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1:]
    for layer in cache.layers:
        layer.update = partial(_prompt_and_completion, layer, prompt_of_row)
    completion_states = backbone(
        input_ids=input_ids[:, completion],
        attention_mask=attention_mask,
        position_ids=position_ids[:, completion],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    for layer in cache.layers:
        del layer.update  # it holds the layer, which would keep its keys and values until they are collected
    return torch.cat([prompt_states[prompt_of_row], completion_states[:, :-1]], dim=1)


def _prompt_and_completion(
    layer: DynamicLayer, prompt_of_row: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    # In place of `update`, which would keep what it returns: the prompts repeated for each row, in every layer at once
    return (
        torch.cat([layer.keys[prompt_of_row], keys], dim=-2),
        torch.cat([layer.values[prompt_of_row], values], dim=-2),
    )
