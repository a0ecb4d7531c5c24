"""A model by its shapes: its configuration, and modules on the meta device. No weights are loaded."""

import copy
import json
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


# Of bitsandbytes' 4 bits: values that share a scale, and scales that share one if those are quantised too; bytes of a
# weight's table of 16 values, and, if its scales are quantised, of their table of 256 and their mean
_BLOCK, _NESTED_BLOCK = 64, 256
_TABLE, _NESTED = 64, 1024 + 4


def quantised_bytes(num_rows: int, num_columns: int, bits: int, nested: bool) -> int:
    """
    Bytes of a quantised weight, with its scales, as bitsandbytes keeps it.

    Args:
        num_rows (`int`):
            Its rows.
        num_columns (`int`):
            Its columns.
        bits (`int`):
            4 or 8.
        nested (`bool`):
            Whether the scales of 4 bits are quantised too.
    """
    number = num_rows * num_columns
    if bits == 8:
        return number + 4 * num_rows
    scales = -(-number // _BLOCK)
    scale_bytes = scales + 4 * -(-scales // _NESTED_BLOCK) + _NESTED if nested else 4 * scales
    return -(-number // 2) + _TABLE + scale_bytes


def load_config(name: str, path: Path | None, field: str, **kwargs: Any) -> Any:
    """
    Configuration of a model.

    Args:
        name (`str`):
            Id on the Hub, or a folder.
        path (`Path`, *optional*):
            Its config.json, if that is somewhere else.
        field (`str`):
            Flag that names such a file, for the message.
        **kwargs:
            Keyword arguments of `AutoConfig.from_pretrained`.

    Raises:
        ValueError: If there is none that can be read here, or it is of a model that reads images too.
    """
    config = _read_config(name, path, field, **kwargs)
    if getattr(config, "vision_config", None) is not None:
        raise ValueError(
            f"{path or name} reads images, whose tokens and passes are not planned. For what text takes, name by "
            f"`{field}` the config.json of a causal language model as large as its text part, such as Qwen3-8B's for "
            f"Qwen3-VL-8B."
        )
    return config


def _read_config(name: str, path: Path | None, field: str, **kwargs: Any) -> Any:
    if path is not None:
        file = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return AutoConfig.for_model(**values)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"`{field} {path}` is no configuration of a model: {error}") from error
    try:
        return AutoConfig.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        where = "no folder of a model, and not" if Path(name).is_absolute() or name.startswith(".") else "not"
        raise ValueError(
            f"The configuration of {name!r} is {where} on this machine, and the Hub could not be asked. With a "
            f"network it is a few kB, no weights; without one, name its config.json by `{field}`."
        ) from error


@dataclass(frozen=True, eq=False)
class Model:
    """
    A causal language model that nobody has loaded.

    Args:
        config (`PreTrainedConfig`):
            Its configuration.
        dtype (`torch.dtype`):
            What it is loaded in.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter that is trained in place of its weights.
        bits (`int`, *optional*, defaults to `16`):
            4 or 8 if its linear layers are quantised.
        nested (`bool`, *optional*, defaults to `False`):
            Whether the scales of 4 bits are quantised too.
        is_trained (`bool`, *optional*, defaults to `True`):
            Whether it is the policy.
        attention (`str`, *optional*):
            Implementation of attention, `None` for the default.
    """

    config: Any
    dtype: torch.dtype
    peft_config: PeftConfig | None = None
    bits: int = 16
    nested: bool = False
    is_trained: bool = True
    attention: str | None = None

    def variant(self, **changes: Any) -> "Model":
        """The same with other arguments, and one object for the same ones: what is known of it is kept."""
        known = self.__dict__.setdefault("_variants", {})
        key = tuple((name, id(value) if name == "peft_config" else value) for name, value in changes.items())
        if key not in known:
            known[key] = replace(self, **changes)
        return known[key]

    @property
    def text_config(self) -> Any:
        """Configuration of what reads text."""
        return self.config.get_text_config()

    @property
    def num_layers(self) -> int:
        """Layers of the backbone."""
        return int(self.text_config.num_hidden_layers)

    @property
    def packs(self) -> bool:
        """Whether its attention takes rows without padding."""
        return (self.attention or "").startswith("flash_attention")

    def build(self, num_layers: int | None = None) -> Any:
        """
        The modules on the meta device, with the adapter.

        Args:
            num_layers (`int`, *optional*):
                Layers. `None` for all.
        """
        config = copy.deepcopy(self.config)
        if num_layers is not None:
            text = config.get_text_config()
            text.num_hidden_layers = num_layers
            for name in ("layer_types", "mlp_layer_types"):
                if getattr(text, name, None):
                    with suppress(AttributeError):  # follows from the number
                        setattr(text, name, getattr(text, name)[:num_layers])
        # The kernels of flash attention need not be installed here
        attention = "sdpa" if self.packs else self.attention
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation=attention)
            if self.peft_config is not None:
                model = get_peft_model(model, copy.deepcopy(self.peft_config))
                for parameter in model.parameters() if self.bits < 16 else ():
                    if parameter.requires_grad:  # as GRPOTrainer trains an adapter of a quantised model
                        parameter.data = parameter.data.to(torch.bfloat16)
        return model if self.is_trained else model.requires_grad_(False)

    @cached_property
    def modules(self) -> Any:
        """All of it."""
        return self.build()

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Its parameters, shared ones once."""
        return list(self.modules.parameters())

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]

    @property
    def num_parameters(self) -> int:
        """Number of its weights."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def num_trained(self) -> int:
        """Number of those that are trained."""
        return sum(parameter.numel() for parameter in self.trained)

    @property
    def head(self) -> nn.Parameter:
        """Weight of the head, possibly that of the embedding."""
        return self.modules.get_output_embeddings().weight

    @property
    def embedding(self) -> nn.Parameter:
        """Weight of the embedding."""
        return self.modules.get_input_embeddings().weight

    @cached_property
    def num_matrix(self) -> int:
        """Weights of the backbone that every token is multiplied with: of experts, as many as it is sent to."""
        others = {id(self.head), id(self.embedding)}
        matrices = [one for one in self.parameters if id(one) not in others]
        experts = sum(min(self.experts_of_a_token, one.size(0)) * one[0].numel() for one in matrices if one.ndim == 3)
        return experts + sum(one.numel() for one in matrices if one.ndim == 2)

    @property
    def experts_of_a_token(self) -> int:
        """Experts that each token is sent to, as far as the configuration says so in a way that is known."""
        names = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
        return int(next((found for name in names if (found := getattr(self.text_config, name, None))), 2**31))

    @property
    def kinds(self) -> list[Any]:
        """What tells its layers from one another: the type that its configuration names, and their weights."""
        lists = (one for one in self.modules.modules() if isinstance(one, nn.ModuleList))
        layers = next((one for one in lists if len(one) == self.num_layers), nn.ModuleList())
        shapes = [[(name, one.shape) for name, one in layer.named_parameters()] for layer in layers]
        types = getattr(self.text_config, "layer_types", None) or [""] * self.num_layers
        return list(zip(types, shapes or [[]] * self.num_layers, strict=False))

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self.head.size(0))

    @property
    def largest_module(self) -> int:
        """Weights of the module that has most of its own."""
        return max(sum(one.numel() for one in module.parameters(recurse=False)) for module in self.modules.modules())

    @property
    def num_layer(self) -> int:
        """Weights of a layer."""
        edges = {id(self.head): self.head.numel(), id(self.embedding): self.embedding.numel()}
        return (self.num_parameters - sum(edges.values())) // self.num_layers

    def bytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of its weights, as they are loaded or in another dtype."""
        if dtype is not None:
            return self.num_parameters * dtype.itemsize
        quantised = self._quantised if self.bits < 16 else {}
        return sum(quantised.get(id(one), one.numel() * one.dtype.itemsize) for one in self.parameters)

    @property
    def _quantised(self) -> dict[int, int]:
        """Bytes of the weights that are quantised: all linear layers' but the head's and the adapter's."""
        found = {}
        for name, module in self.modules.named_modules():
            if isinstance(module, nn.Linear) and module.weight is not self.head and "lora_" not in name:
                num_rows, num_columns = module.weight.shape
                found[id(module.weight)] = quantised_bytes(num_rows, num_columns, self.bits, self.nested)
        return found

    def cache_bytes(self, num_tokens: int, itemsize: int = 2) -> int:
        """Bytes of the keys and values of so many tokens, every layer remembering all of them."""
        text = self.text_config
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        return (
            2 * num_tokens * self.num_layers * (getattr(text, "num_key_value_heads", None) or heads) * width * itemsize
        )
