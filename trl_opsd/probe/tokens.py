"""Kinds of tokens, and how much of a text stands in another."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ..eval.markers import MARKERS


KINDS = ("math", "word", "style", "format", "end")
"""What a token can be: numbers, operators and single letters; other words; words of hedging and connection;
punctuation, white space and markup; special tokens, such as the end of a turn."""

STYLE = (
    *MARKERS,
    *("so", "therefore", "thus", "hence", "first", "second", "next", "then", "now", "finally", "let", "let's", "lets"),
    *("okay", "ok", "alright", "well", "sure", "indeed", "however", "but", "also", "because", "since", "note"),
    *("think", "understand", "reference", "recall", "notice", "clearly", "simply", "together", "overall"),
)
"""Words that say how a text goes on and not what it says: those of hedging that the evaluation counts, and others that
connect or address."""

_PATTERNS = (
    # What only says how a formula is set
    ("format", r"\*\*+|\\(?:boxed|fbox|text\w*|mathrm|mathbf|left|right|begin|end|[bB]ig\w*|quad|[()\[\],;:! ])"),
    ("math", r"\\[A-Za-z]+|\d|[=+*/^<>%×÷·±≤≥≠≈√∑∏∫π∞]|(?<![A-Za-z])[−-](?![A-Za-z])"),
    ("style", rf"\b(?:{'|'.join(map(re.escape, sorted(STYLE, key=len, reverse=True)))})\b"),
    ("math", r"(?<![A-Za-z'’])[b-hj-zB-HJ-Z](?![A-Za-z'’])"),
    ("word", r"[^\W\d_]+"),
    ("format", r"\s|."),
)
_NAMES = [name for name, _ in _PATTERNS]
_ANY = re.compile("|".join(f"({pattern})" for _, pattern in _PATTERNS), re.IGNORECASE | re.DOTALL)
_WORD = re.compile(r"\d+|[^\W\d_]+|[^\w\s]|_")
# Shorter runs of words are shared by texts that have nothing to do with each other
RUN = 8


def pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """
    The text that each token adds to those before it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        token_ids (`Sequence[int]`):
            Tokens.
    """
    # After another token, since some tokenizers drop the space in front of a text
    alone = tokenizer.batch_decode([[its] for its in token_ids], clean_up_tokenization_spaces=False)
    pairs = tokenizer.batch_decode([list(pair) for pair in pairwise(token_ids)], clean_up_tokenization_spaces=False)
    return alone[:1] + [pair[len(before) :] for before, pair in zip(alone, pairs, strict=False)]


def token_kinds(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """
    The kind of each token, one of `KINDS`: that of most of its characters that are no white space, in the text of all.
    A word is of one kind however it is cut into tokens.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        token_ids (`Sequence[int]`):
            Tokens of a completion.
    """
    special = set(tokenizer.all_special_ids)
    texts = ["" if its in special else text for its, text in zip(token_ids, pieces(tokenizer, token_ids), strict=True)]
    whole = "".join(texts)
    of_characters: list[str] = []
    for match in _ANY.finditer(whole):
        of_characters += [_NAMES[(match.lastindex or 1) - 1]] * len(match[0])
    kinds, start = [], 0
    for its, text in zip(token_ids, texts, strict=True):
        counts = Counter(
            of_characters[place] for place in range(start, start + len(text)) if not whole[place].isspace()
        )
        start += len(text)
        kinds.append("end" if its in special else counts.most_common(1)[0][0] if counts else "format")
    return kinds


def words(text: str) -> list[str]:
    """Numbers, words and marks of a text, in small letters."""
    return _WORD.findall(text.lower())


def verbatim_share(text: str, source: str) -> float | None:
    """
    The share of a text's words, numbers and marks that stand in runs of at least `RUN` which another has too.

    Args:
        text (`str`):
            Text.
        source (`str`):
            The other.

    Returns:
        `float`, *optional*: between 0 and 1. `None` where one of them is shorter than a run.
    """
    its, theirs = words(text), words(source)
    if min(len(its), len(theirs)) < RUN:
        return None
    known = {tuple(theirs[start : start + RUN]) for start in range(len(theirs) - RUN + 1)}
    covered = [False] * len(its)
    for start in range(len(its) - RUN + 1):
        if tuple(its[start : start + RUN]) in known:
            covered[start : start + RUN] = [True] * RUN
    return sum(covered) / len(its)
