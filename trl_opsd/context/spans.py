"""Parts of a rollout that somebody has marked: from an annotation in JSON to spans of its text, and of its tokens."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from .base import without_thinking
from .rollouts import Rollout


@dataclass(frozen=True)
class Span:
    """
    A part of a rollout's text.

    Args:
        start (`int`):
            First character.
        end (`int`):
            The one after the last.
        kind (`str`):
            What parts of the method know it by, such as `"key"`.
        label (`str`):
            What the teacher may hear of it.
    """

    start: int
    end: int
    kind: str
    label: str


@dataclass(frozen=True)
class Marks:
    """
    What an annotation marks.

    Args:
        spans (`list[Span]`, *optional*):
            Those that can be used, in order, without an overlap.
        num_dropped (`int`, *optional*, defaults to `0`):
            Number of others that it holds.
        was_asked (`bool`, *optional*, defaults to `True`):
            Whether there is an annotation.
        is_readable (`bool`, *optional*, defaults to `True`):
            Whether it holds a list.
    """

    spans: list[Span] = field(default_factory=list)
    num_dropped: int = 0
    was_asked: bool = True
    is_readable: bool = True


Place = Callable[[dict[str, Any]], tuple[int, int] | None]
"""From what an annotation says of a span to its first character and the one after its last, `None` if that is none."""


def read_marks(annotation: str | list[Any] | None, place: Place, kind: str, labels: Sequence[str], most: int) -> Marks:
    """
    Read an annotation, and drop what cannot be used: what is outside the text, overlaps an earlier span, has an
    unknown type, or is one too many.

    Args:
        annotation (`str` or `list[Any]`, *optional*):
            A list of objects, or text in which there is one as JSON. `None` without an annotation.
        place (`Callable`):
            Where a span is.
        kind (`str`):
            Kind of all spans.
        labels (`Sequence[str]`):
            The types that a span may have, under `"type"`.
        most (`int`):
            Most spans.
    """
    if annotation is None:
        return Marks(was_asked=False)
    items = annotation if isinstance(annotation, list) else _json_list(without_thinking(annotation))
    if items is None:
        return Marks(is_readable=False)
    kept: list[Span] = []
    for item in items:
        where = place(item) if isinstance(item, dict) and item.get("type") in labels else None
        if where is None or len(kept) == most or any(where[0] < its.end and its.start < where[1] for its in kept):
            continue
        kept.append(Span(*where, kind, item["type"]))
    return Marks(sorted(kept, key=lambda span: span.start), len(items) - len(kept))


def _json_list(text: str) -> list[Any] | None:
    """The first list of objects, or of nothing, that is JSON in a text."""
    decoder = json.JSONDecoder()
    for found in re.finditer(r"\[(?=\s*[{\]])", text):
        try:
            value, _ = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            continue
        return value
    return None


def by_characters(text: str) -> Place:
    """Spans by their characters, from `"start"` to before `"end"`."""

    def place(item: dict[str, Any]) -> tuple[int, int] | None:
        start, end = (_integer(item.get(name)) for name in ("start", "end"))
        return None if start is None or end is None or not 0 <= start < end <= len(text) else (start, end)

    return place


def by_segments(pieces: Sequence[tuple[int, int]], most: int) -> Place:
    """Spans by the numbers of their segments, counted from 1, from `"first"` to `"last"`, at most `most` of them."""

    def place(item: dict[str, Any]) -> tuple[int, int] | None:
        first, last = (_integer(item.get(name)) for name in ("first", "last"))
        if first is None or last is None or not 1 <= first <= last <= len(pieces) or last - first >= most:
            return None
        return pieces[first - 1][0], pieces[last - 1][1]

    return place


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def segments(text: str) -> list[tuple[int, int]]:
    """Where the lines of a text, and the sentences in them, begin and end."""
    return [(found.start(), found.end()) for found in re.finditer(r"\S.*?(?:[.!?](?=\s)|(?=\n)|\Z)", text)]


def token_masks(
    tokenizer: PreTrainedTokenizerBase, rollout: Rollout, spans: Sequence[Span], most_of_it: float
) -> dict[str, list[bool]]:
    """
    The tokens of a rollout that are in its spans, in order, until so many are marked.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes them.
        rollout ([`Rollout`]):
            The rollout.
        spans (`Sequence[Span]`):
            Its spans.
        most_of_it (`float`):
            Largest share of its tokens to mark, rounded down.

    Returns:
        `dict[str, list[bool]]`: by the kind of a span, whether each token is in one. Empty without spans, or if the
        text is not found among the tokens.
    """
    if not spans:
        return {}
    whole = tokenizer.decode(rollout.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    offset = str(whole).find(rollout.text)
    if offset < 0:
        return {}
    masks = {span.kind: [False] * len(rollout.token_ids) for span in spans}
    left = math.floor(most_of_it * len(rollout.token_ids))
    for token, (start, end) in enumerate(_places(tokenizer, rollout.token_ids)):
        for span in spans:
            if left and start - offset < span.end and span.start < end - offset:
                masks[span.kind][token] = True
                left -= 1
                break
    return masks


def _places(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[tuple[int, int]]:
    """
    The characters of each token in the text of all. Tokens that make up a character together all have it, special ones
    none. Each is decoded after the few before it that some decoders need, not after all.
    """

    def decoded(start: int, end: int) -> str:
        ids = list(token_ids[start:end])
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    places: list[tuple[int, int]] = []
    length, context, first = 0, 0, 0  # `first` is the first token whose characters are not complete yet
    for position in range(len(token_ids)):
        before, after = decoded(context, first), decoded(context, position + 1)
        is_complete = not after.endswith("\ufffd") or position + 1 - first >= _LONGEST_CHARACTER
        if not is_complete:
            continue
        end = length + len(after) - len(before)
        places += [(length, end)] * (position + 1 - first)
        length, context, first = end, first, position + 1
    return places + [(length, length + 1)] * (len(token_ids) - first)


_LONGEST_CHARACTER = 6  # tokens
