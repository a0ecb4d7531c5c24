import pytest

from trl_opsd.eval.markers import MARKERS, count_marker_substrings, count_marker_words
from trl_opsd.sampling.loops import is_repetitive


@pytest.mark.parametrize(
    ("text", "substrings", "words"),
    [
        ("", 0, 0),
        ("The sum is 7.", 0, 0),
        ("Wait, WAIT: hmm.", 3, 3),
        ("It is unlikely. I checked.", 2, 0),
        ("checkmate, checks, check-in", 3, 1),
        ("maybe\nperhaps seems", 3, 3),
        ("It seemed almighty, hmmm", 2, 0),
    ],
)
def test_counts(text, substrings, words):
    assert count_marker_substrings(text) == substrings
    assert count_marker_words(text) == words


def test_all_markers():
    text = "Wait, hmm. Perhaps, maybe, actually; alternatively it seems it might, likely, check."
    assert len(MARKERS) == 10
    assert count_marker_substrings(text) == count_marker_words(text) == 10


def test_repetition():
    prose = "".join(f"{i * i * 7919 % 10007} " for i in range(2500))
    assert not is_repetitive("")
    assert not is_repetitive("no " * 5)
    assert not is_repetitive(prose)
    assert is_repetitive("so we try again " * 700)
    # Only the end counts, and all of the last 10,000 characters.
    assert is_repetitive(prose + "x" * 10_000)
    assert not is_repetitive("x" * 10_000 + prose)
    assert not is_repetitive(prose + "x" * 7_000)


def test_repetition_is_above_ten():
    # zlib takes 12 bytes for each.
    assert not is_repetitive("x" * 118)
    assert is_repetitive("x" * 125)
    assert is_repetitive("ж" * 10_000)
    assert is_repetitive("\ud800" * 10_000)
