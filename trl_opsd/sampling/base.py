"""What every backend takes and gives: token ids in, token ids out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Sampling:
    """
    How the next token is drawn: the logits are divided by the temperature, then the `top_k` likeliest tokens are kept,
    then the likeliest that together reach `top_p`. No backend applies anything else, whatever the model's own
    generation configuration says.

    Args:
        temperature (`float`):
            0 always takes the likeliest token.
        top_p (`float`):
            1 keeps all tokens.
        top_k (`int`):
            0 keeps all tokens.
        max_new_tokens (`int`):
            Longest completion, the end-of-turn token included.

    Raises:
        ValueError: If a value is out of its range.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        for name, minimum in (("temperature", 0), ("top_k", 0), ("max_new_tokens", 1)):
            if getattr(self, name) < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {getattr(self, name)}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}.")


@dataclass(frozen=True)
class Request:
    """
    One completion to generate.

    Args:
        prompt_ids (`list[int]`):
            The whole prompt, special tokens included. Nothing is added to it.
        seed (`int`):
            Seed of this completion. What it gives does not depend on the other requests.
    """

    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """
    What a model generated.

    Args:
        token_ids (`list[int]`):
            Generated tokens, the end-of-turn token included.
        terminated (`bool`):
            Whether it ended by itself. `False`: cut off at the token limit.
    """

    token_ids: list[int]
    terminated: bool


class Backend(Protocol):
    """What generates completions."""

    max_length: int | None
    """Most tokens that a prompt and its completion may have together. `None` if there is no limit."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """
        Generates one completion per request.

        Args:
            requests (`Sequence[Request]`):
                What to generate.
            sampling ([`Sampling`]):
                How to draw tokens.

        Yields:
            `tuple[int, Completion]`:
                Position of the request and its completion, as they finish, in any order.
        """
        ...


def end_token_ids(tokenizer: Any, name_or_path: str, **kwargs: Any) -> list[int]:
    """
    Tokens that end a completion: those of the model's generation configuration and the tokenizer's.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        name_or_path (`str`):
            Model.
        **kwargs:
            `revision` and `trust_remote_code` of the model.

    Returns:
        `list[int]`:
            Token ids in ascending order.

    Raises:
        ValueError: If there are none.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(name_or_path, **kwargs).eos_token_id
    except OSError:  # a model without generation_config.json
        configured = getattr(AutoConfig.from_pretrained(name_or_path, **kwargs), "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    if not ids:
        raise ValueError(
            f"Neither {name_or_path} nor its tokenizer names an `eos_token`, so no answer would ever end."
        )
    return sorted(ids)
