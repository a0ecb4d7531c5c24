"""What the text of a completion shows: expressions of uncertainty."""

import re


MARKERS = ("wait", "hmm", "perhaps", "maybe", "actually", "alternatively", "seems", "might", "likely", "check")
_WORDS = re.compile(rf"\b(?:{'|'.join(MARKERS)})\b")


def count_marker_substrings(text: str) -> int:
    """
    Counts epistemic markers as published in the study of [how self-distillation can degrade
    reasoning](https://huggingface.co/papers/2603.24472): anywhere in the lower-cased text, also inside other words
    ("unlikely", "checked").

    Args:
        text (`str`):
            Completion, the thinking part included.

    Returns:
        `int`:
            Occurrences of all markers.
    """
    lowered = text.lower()
    return sum(lowered.count(marker) for marker in MARKERS)


def count_marker_words(text: str) -> int:
    """
    Counts epistemic markers that are words of their own.

    Args:
        text (`str`):
            Completion, the thinking part included.

    Returns:
        `int`:
            Occurrences of all markers, whatever their case.
    """
    return len(_WORDS.findall(text.lower()))
