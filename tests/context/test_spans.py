"""From annotations to spans, and from spans to tokens."""

import json

import pytest
from rollouts import make_rollouts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_opsd.context import Rollout
from trl_opsd.context.spans import Marks, Span, by_characters, by_segments, read_marks, segments, token_masks


TEXT = "First we add. Then we carry 1.\nSo it is 12"
LABELS = ("insight", "symmetry")


def read(annotation, most=3, text=TEXT):
    marks = read_marks(annotation, by_characters(text), "key", LABELS, most)
    return [(span.start, span.end, span.label) for span in marks.spans], marks.num_dropped


def span(start, end, label="insight"):
    return {"start": start, "end": end, "type": label}


def test_spans_by_characters_in_order():
    given = [span(10, 12), span(0, 5, "symmetry")]
    expected = ([(0, 5, "symmetry"), (10, 12, "insight")], 0)
    assert read(given) == expected
    assert read(json.dumps(given)) == expected
    assert read(f"<think>Hm [1].</think>Here they are: ```json\n{json.dumps(given)}``` [that is all]") == expected
    assert read([]) == read("[]") == ([], 0)


@pytest.mark.parametrize(
    "useless",
    [
        span(-1, 3),
        span(3, 3),
        span(5, 3),
        span(0, len(TEXT) + 1),
        span(0.0, 3),
        span(True, 3),
        span("0", 3),
        span(0, None),
        span(0, 3, "unheard_of"),
        {"start": 0, "end": 3},
        span(0, 3, ["insight"]),
        span(30, 31),
        span(29, 40),
        "insight",
        None,
        [0, 3],
    ],
    ids=str,
)
def test_what_is_of_no_use_is_dropped_and_counted(useless):
    """Outside of the text, overlapping the span from 29 to 33, of no known type, or none at all."""
    assert read([span(29, 33), useless]) == ([(29, 33, "insight")], 1)


def test_spans_that_touch_do_not_overlap():
    assert read([span(3, 5), span(5, 7), span(1, 3)])[1] == 0


def test_more_spans_than_allowed_are_dropped():
    assert read([span(index, index + 1) for index in range(5)], most=2) == ([(0, 1, "insight"), (1, 2, "insight")], 3)


@pytest.mark.parametrize("text", ["", "None.", "{}", "[", '[{"start": 0,', "<think>[]", "[" * 100_000, "As in [1]."])
def test_not_json(text):
    assert read_marks(text, by_characters(TEXT), "key", LABELS, 3) == Marks(is_readable=False)


def test_nobody_was_asked():
    assert read_marks(None, by_characters(TEXT), "key", LABELS, 3) == Marks(was_asked=False)


def test_segments_are_lines_and_sentences():
    found = [TEXT[start:end] for start, end in segments(TEXT)]
    assert found == ["First we add.", "Then we carry 1.", "So it is 12"]
    assert segments("") == segments(" \n ") == []
    assert [("1.5 is less"[a:b]) for a, b in segments("1.5 is less")] == ["1.5 is less"]


def test_spans_by_segments():
    pieces = segments(TEXT)

    def place(first, last):
        return by_segments(pieces, 2)({"first": first, "last": last})

    assert place(1, 1) == pieces[0]
    assert place(2, 3) == (pieces[1][0], pieces[2][1])
    for first, last in ((0, 1), (1, 4), (3, 2), (1, 3), ("1", 1), (1, None), (True, 1)):
        assert place(first, last) is None


# Tokens


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """One token per byte, so that most characters of some languages take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def marked(tokenizer, text, *where, most_of_it=1.0, shown=None):
    """The tokens in some spans, as text; every text ends with a special token."""
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    rollout = Rollout(text if shown is None else shown, ids, 1.0, True, None, False, 0)
    masks = token_masks(tokenizer, rollout, [Span(*its, "key", "insight") for its in where], most_of_it)
    [mask] = masks.values() if masks else [[False] * len(ids)]
    assert len(mask) == len(ids)
    return tokenizer.decode([token for token, is_in in zip(ids, mask, strict=True) if is_in])


def test_tokens_of_spans(tokenizer, bytes_tokenizer):
    for one in (tokenizer, bytes_tokenizer):
        assert marked(one, TEXT, (6, 12), (31, 33)) == "we addSo"
        assert marked(one, TEXT, (0, len(TEXT))) == TEXT
        assert marked(one, TEXT) == ""


def test_characters_of_several_tokens(bytes_tokenizer):
    text = "naïve 数学 🙂!"
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            assert marked(bytes_tokenizer, text, (start, end)) == text[start:end]


def test_no_more_than_a_share_is_marked(tokenizer):
    text = "abcdefghijk"  # and an end
    assert marked(tokenizer, text, (2, 9), most_of_it=0.25) == "cde"
    assert marked(tokenizer, text, (2, 4), (8, 10), most_of_it=0.25) == "cdi"
    assert marked(tokenizer, "ab", (0, 2), most_of_it=0.25) == ""


def test_text_that_is_a_part_of_what_was_written(tokenizer):
    """The reasoning, say, is not shown."""
    assert marked(tokenizer, "Hm. abc", (0, 2), shown="abc") == "ab"
    assert marked(tokenizer, "Hm. abc", (0, 2), shown="another") == ""


def test_rollouts_without_tokens(tokenizer):
    [rollout] = make_rollouts([1.0], [""])
    assert token_masks(tokenizer, rollout, [], 0.25) == {}
