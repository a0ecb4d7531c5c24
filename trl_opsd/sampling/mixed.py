"""Completions each token of which is drawn after one of two prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from .base import Backend, Completion, Request, Sampling


# Completions under way at once where each token is a request: the engine should keep what it computed of them all
_UNDER_WAY = 64


@dataclass(frozen=True)
class MixedRequest(Request):
    """
    One completion to generate from two prompts, of which each token continues what both have so far.

    Args:
        other_prompt_ids (`list[int]`):
            The other prompt.
        share (`float`):
            Probability with which a token is drawn after `prompt_ids`, and not after `other_prompt_ids`.
    """

    other_prompt_ids: list[int]
    share: float


@dataclass(frozen=True)
class MixedCompletion(Completion):
    """
    What a model generated from two prompts.

    Args:
        sides (`list[bool]`):
            For each token, whether it was drawn after `prompt_ids`.
    """

    sides: list[bool]


@runtime_checkable
class MixingBackend(Protocol):
    """A backend that can do better than a request for each token."""

    def generate_mixed(
        self, requests: Sequence[MixedRequest], sampling: Sampling
    ) -> Iterator[tuple[int, MixedCompletion]]:
        """As [`Backend.generate`]."""
        ...


def generate_mixed(
    backend: Backend, requests: Sequence[MixedRequest], sampling: Sampling
) -> Iterator[tuple[int, MixedCompletion]]:
    """
    Generates one completion per request.

    Args:
        backend ([`Backend`]):
            What generates. Unless it is a [`MixingBackend`], it is asked for one token at a time, which an engine with
            a prefix cache takes without computing anew what it has.
        requests (`Sequence[MixedRequest]`):
            What to generate.
        sampling ([`Sampling`]):
            How to draw tokens.

    Yields:
        `tuple[int, MixedCompletion]`:
            Position of the request and its completion, as they finish, in any order.
    """
    if isinstance(backend, MixingBackend):
        yield from backend.generate_mixed(requests, sampling)
        return
    waiting = iter(enumerate(requests))
    under_way: dict[int, tuple[MixedRequest, list[bool], list[int]]] = {}
    while True:
        while len(under_way) < _UNDER_WAY and (item := next(waiting, None)) is not None:
            position, request = item
            under_way[position] = request, sides_of(request, sampling.max_new_tokens), []
        if not under_way:
            return
        positions = list(under_way)
        asked = [_next_token(*under_way[position]) for position in positions]
        for index, token in backend.generate(asked, replace(sampling, max_new_tokens=1)):
            position = positions[index]
            _, sides, ids = under_way[position]
            ids += token.token_ids
            if token.terminated or len(ids) == sampling.max_new_tokens:
                del under_way[position]
                yield position, MixedCompletion(ids, token.terminated, sides[: len(ids)])


def sides_of(request: MixedRequest, number: int) -> list[bool]:
    """
    Which of the first tokens of a completion are drawn after its own prompt.

    Args:
        request ([`MixedRequest`]):
            What is generated.
        number (`int`):
            Number of tokens.
    """
    sides: list[bool] = (draws(request.seed, number) < request.share).tolist()
    return sides


def draws(seed: int, number: int) -> np.ndarray:
    """
    Numbers that choose the sides of a completion.

    Args:
        seed (`int`):
            Seed of the completion. Its tokens are drawn with other numbers.
        number (`int`):
            How many.
    """
    return np.random.default_rng([seed, 1]).random(number)


def _next_token(request: MixedRequest, sides: list[bool], ids: list[int]) -> Request:
    prompt = request.prompt_ids if sides[len(ids)] else request.other_prompt_ids
    return Request(prompt + ids, int(np.random.default_rng([request.seed, 2, len(ids)]).integers(2**32)))
