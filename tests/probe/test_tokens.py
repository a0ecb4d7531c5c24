"""Kinds of tokens, and runs of words that two texts share."""

import pytest

from trl_opsd.probe.tokens import pieces, token_kinds, verbatim_share


def kinds(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == text
    return "".join(
        {"math": "m", "word": "w", "style": "s", "format": "f", "end": "e"}[its] for its in token_kinds(tokenizer, ids)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12+3=15", "mmmmmmm"),
        ("Wait, so", "ssssffss"),
        ("Waiter", "wwwwww"),
        ("x is a", "mfwwfw"),
        ("well-known", "ssssfwwwww"),
        ("3 - 4", "mfmfm"),
        (r"\boxed{7}", "fffffffmf"),
        (r"\frac12", "mmmmmmm"),
        ("**Hm**\n", "ffwwfff"),
    ],
)
def test_each_character_has_a_kind(tokenizer, text, expected):
    assert kinds(tokenizer, text) == expected


def test_the_end_of_a_turn_is_a_kind_of_its_own(tokenizer):
    assert token_kinds(tokenizer, [*tokenizer("7")["input_ids"], tokenizer.eos_token_id]) == ["math", "end"]


def test_a_word_is_of_one_kind_however_it_is_cut():
    class Cut:
        all_special_ids = ()

        def batch_decode(self, ids, **kwargs):
            texts = ["alter", "natively", " ", "12", "kg,"]
            return ["".join(texts[its] for its in some) for some in ids]

    assert token_kinds(Cut(), range(5)) == ["style", "style", "format", "math", "word"]


def test_verbatim_share():
    source = "one two three four five six seven eight nine ten"
    assert verbatim_share(source.upper(), source) == 1.0
    assert verbatim_share("zero one two three four five six seven eight more", source) == 0.8
    assert verbatim_share("one two three four five six seven and eight nine", source) == 0.0
    assert verbatim_share("too short", source) is None
    assert verbatim_share(source, "too short") is None
