"""Completions that end in a loop."""

import zlib


def is_repetitive(text: str) -> bool:
    """
    Tells whether a completion ends in a loop, as in [StableOPD](https://huggingface.co/papers/2604.08527): its last
    10,000 characters compress more than tenfold.

    Args:
        text (`str`):
            Completion, the thinking part included.

    Returns:
        `bool`:
            Whether zlib's ratio, bytes in UTF-8 over compressed bytes, is above 10.
    """
    # A lone surrogate, half of a character that a sampler split, has no UTF-8 form.
    end = text[-10_000:].encode("utf-8", errors="replace")
    return len(end) > 10 * len(zlib.compress(end))
