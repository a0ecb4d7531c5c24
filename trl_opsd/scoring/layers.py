"""What the layers of a model carry from one token to the next."""

from typing import Any

from .heads import backbone_of


def reads_more_than_text(config: Any) -> bool:
    """Whether a model's configuration is of text and something else, such as images."""
    return config.get_text_config() is not config


def remembers_keys_and_values_only(model: Any) -> bool:
    """
    Whether keys and values, which can be told apart by row, are all that a causal language model remembers.

    A recurrent state is no such thing. Models whose code does not come from transformers, and those that read more
    than text, are not relied on.
    """
    config = model.config
    # FSDP2 gives the class, but not its methods, a module of its own
    code = type(backbone_of(model)).forward.__module__
    return (
        code.startswith("transformers.models.")
        and not reads_more_than_text(config)
        and not model._is_stateful
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
    )
