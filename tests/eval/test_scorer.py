r"""One right answer, one verdict: whatever its format, and on every completion of completions.jsonl."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_opsd.eval import equivalence
from trl_opsd.eval.equivalence import compare
from trl_opsd.eval.scorer import Verdict, check_reference, score, score_named


pytestmark = pytest.mark.needs("math_verify")
TIME_LIMIT = equivalence.TIME_LIMIT
FIXTURES = [json.loads(line) for line in Path(__file__).with_name("completions.jsonl").open(encoding="utf-8")]

FORMATS = {
    "boxed": [
        r"So we are done: $\boxed{%s}$.",
        r"\[\boxed{ %s }\]",
        "**\\boxed{%s}**\n\nLet me know if it is unclear.",
    ],
    "answer_line": [
        "Answer: %s",
        "We add 3 and 4.\n\n**Answer:** $%s$",
        "**Final Answer: %s**",
        "### Final Answer\n\n$$\n%s\n$$",
        "Adding up, the answer is %s.",
        "The final answer is: $%s$. I hope it is correct.",
    ],
    "hashes": ["3 + 4 is not it.\n#### %s"],
    "bare": ["We add 3 and 4, then simplify.\n\n%s", "This gives\n\n\\[\n%s\n\\]", "In the end:\n**%s**"],
}
LETTER_FORMATS = {
    "boxed": [r"\boxed{%s}", r"\boxed{\text{%s}}", r"$\boxed{\textbf{(%s)}\ 12}$"],
    "answer_line": [
        "Answer: %s",
        "**Answer:** (%s)",
        "The correct option is **%s**.",
        "Answer: %s. 12 m/s",
        "### Answer\n%s",
    ],
    "hashes": ["#### %s"],
    "choice": ["We compare all.\n\n%s", "(%s)", "**%s**", "**%s.**", "So option %s is correct.", "(%s) 12 m/s"],
}


def cases(formats):
    return st.sampled_from([(name, template) for name, templates in formats.items() for template in templates])


integers = st.integers(-(10**7), 10**7).map(str)
decimals = st.decimals(-1000, 1000, places=2, allow_nan=False).map(str)
fractions = st.builds(
    r"{}\frac{{{}}}{{{}}}".format, st.sampled_from(["", "-"]), st.integers(1, 99), st.integers(2, 99)
)
lists = st.lists(st.integers(-99, 99), min_size=2, max_size=4, unique=True).map(
    lambda numbers: ", ".join(map(str, numbers))
)
pairs = st.builds("({}, {})".format, st.integers(-99, 99), st.integers(-99, 99))
formulas = st.builds(r"{}x^2 + \sqrt{{{}}}".format, st.integers(2, 9), st.sampled_from([2, 3, 5, 7]))
values = st.one_of(integers, decimals, fractions, lists, pairs, formulas)


@pytest.mark.parametrize("row", FIXTURES, ids=lambda row: row["note"])
def test_completions(row):
    verdict = score(row["completion"], row["reference"], row["answer_type"])
    assert (verdict.correct, verdict.answer_format) == (row["correct"], row["answer_format"]), verdict
    check_reference(row["reference"], row["answer_type"])


def test_completions_cover_everything():
    assert len(FIXTURES) >= 150
    assert len({(row["completion"], row["reference"]) for row in FIXTURES}) == len(FIXTURES)
    kinds = Counter((row["answer_type"], row["answer_format"], row["correct"]) for row in FIXTURES)
    possible = {
        "math": ["boxed", "answer_line", "hashes", "bare"],
        "choice": ["boxed", "answer_line", "hashes", "choice"],
        "text": ["boxed", "answer_line", "hashes", "bare"],
    }
    for answer_type, formats in possible.items():
        for name in formats:
            assert kinds[answer_type, name, True], (answer_type, name)
        assert any(kinds[answer_type, name, False] for name in formats)
        assert kinds[answer_type, None, False]
    for name in ("boxed", "answer_line", "hashes", "choice", "bare"):
        assert any(kinds[answer_type, name, False] for answer_type in possible)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values, cases(FORMATS))
def test_right_values_are_right_in_every_format(value, case):
    answer_format, template = case
    verdict = score(template % value, value)
    assert (verdict.correct, verdict.answer_format, verdict.error) == (True, answer_format, None), verdict


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(-999, 999), st.integers(1, 99), cases(FORMATS))
def test_wrong_values_are_wrong_in_every_format(value, distance, case):
    answer_format, template = case
    verdict = score(template % (value + distance), str(value))
    assert (verdict.correct, verdict.answer_format, verdict.error) == (False, answer_format, None), verdict


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from("ABCDEFGHIJ"), st.sampled_from("ABCDEFGHIJ"), cases(LETTER_FORMATS))
def test_letters_get_one_verdict_in_every_format(given_letter, reference, case):
    answer_format, template = case
    verdict = score(template % given_letter, reference, "choice")
    assert verdict == Verdict(given_letter == reference, given_letter, answer_format)
    assert score(f"Answer: ({given_letter.lower()})", reference, "choice").answer == given_letter
    assert score(f"Answer: {given_letter.lower()}", reference, "choice").answer == given_letter


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(["red", "Blue", "north", "Zoë"]), min_size=1, max_size=7).map(" ".join), cases(FORMATS)
)
def test_words_get_one_verdict_in_every_format(words, case):
    answer_format, template = case
    verdict = score(template % words, words.upper(), "text")
    assert (verdict.correct, verdict.answer_format) == (True, answer_format), verdict
    assert score(template % words, words + " x", "text").correct is False


pieces = st.sampled_from(
    [
        "\\boxed{", "\\fbox{", "{", "}", "\\", "$", "$$", "\\[", "\\]", "\\(", "#### ", "Answer:", "**", "\n",
        "The answer is ", "5", "x", "=", ",", " or ", "(", ")", "^", "_", "\\frac", "\\text{", "B", "%", "<think>",
        "</think>", "∞", "½", "\x00", "\ud800",
        "\\begin{pmatrix}", "&", "1e9", "\\sqrt", "not", "!",
    ]
)  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.one_of(st.lists(pieces, max_size=20).map("".join), st.text()), st.sampled_from(["math", "choice", "text"]))
def test_nothing_a_completion_says_raises(completion, answer_type):
    first = score(completion, "B" if answer_type == "choice" else "5", answer_type)
    assert first.correct in (True, False)
    assert (first.answer is None) == (first.answer_format is None)
    compare.cache_clear()
    assert score(completion, "B" if answer_type == "choice" else "5", answer_type) == first


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 100_000,
        "{" * 100_000 + "}" * 99_999,
        "\\boxed{" * 50_000 + "1" + "}" * 50_000,
        "".join(f"\\boxed{{{n}}}, " for n in range(30_000)),
        "\\[" * 50_000,
        "$$ x " * 50_000,
        "The answer is not known, and the answer is " * 5_000,
        "Answer: it is\n" * 10_000,
        "answer to " * 20_000,
        "#### " * 100_000,
        "*" * 300_000,
        "Answer" + " " * 300_000,
        "if " * 100_000 + "the answer is 8",
        "\\text{" * 50_000,
        "9" * 300_000,
        "Answer: " + "9" * 300_000,
        "\\boxed{" + "(" * 900 + "}",
        "\\boxed{" + "1, " * 20_000 + "1}",
        "\\boxed{a" + " " * 100_000 + "b}",
        "\\boxed{x" + "_aa" * 300 + "}",
        "x" * 600_000,
        "a = " * 100_000,
        "wait, " * 100_000,
        "!" * 100_000 + "x",
        "\\boxed{5 " + "m/s/" * 200 + "!}",
        "\\boxed{5 " + "min " * 200 + "!}",
        "the answer is " * 5_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_long_and_hostile_completions_end(text, monkeypatch):
    monkeypatch.setattr(equivalence, "TIME_LIMIT", 2.0)
    for answer_type, reference in (("math", "7"), ("choice", "B"), ("text", "seven")):
        assert score(text, reference, answer_type).correct is False


def test_the_answer_after_a_long_completion_is_found():
    text = "Wait, let me check that \\boxed{3} again. Perhaps the answer is 4?\n" * 5_000
    assert score(text + "\n**Answer:** 5", "5") == Verdict(True, "5", "answer_line")


def test_an_endless_comparison_is_stopped_and_reported(monkeypatch):
    compare.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(equivalence, "TIME_LIMIT", 1.0)
        verdict = score(r"$\boxed{9^{9^{9^{9}}}}$", "3")
    assert (verdict.correct, verdict.answer) == (False, "9^{9^{9^{9}}}")
    assert "no verdict within 1 seconds" in verdict.error
    # The next one is graded by a new process.
    assert score(r"$\boxed{4}$", "2 + 2") == Verdict(True, "4", "boxed")


def test_an_answer_math_verify_cannot_read_is_reported():
    verdict = score(r"\boxed{\frac{1}{)}}", "3")
    assert (verdict.correct, verdict.answer) == (False, r"\frac{1}{)}")
    assert "cannot parse" in verdict.error
    assert "longer than 1000" in score(rf"\boxed{{{'1+' * 600}1}}", "3").error


def test_a_process_that_dies_is_reported_and_replaced():
    score(r"\boxed{2 + 2}", "4")
    equivalence._checker._process.kill()
    assert score(r"\boxed{2 + 3}", "5").correct is True


def test_an_interrupted_question_leaves_no_reply_to_the_next(monkeypatch):
    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt

    assert score(r"\boxed{2/4}", "1/2").correct  # the process is running
    monkeypatch.setattr(equivalence._checker._process, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        score(r"\boxed{4/6}", "2/3")
    monkeypatch.undo()
    assert not score(r"\boxed{5/6}", "2/3").correct


def test_process_that_compares_ends_by_itself_when_nobody_stops_it():
    score(r"\boxed{2x}", "x+x")
    pid = equivalence._checker._process.pid
    used = sum(psutil.Process(pid).cpu_times()[:2])
    soft, _ = resource.prlimit(pid, resource.RLIMIT_CPU)
    assert used < soft <= used + 3 * TIME_LIMIT + 1


def test_worker_threads():
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda n: score(rf"\boxed{{\frac{{{2 * n}}}{{2}}}}", str(n)), range(60)))
    assert all(verdict == Verdict(True, rf"\frac{{{2 * n}}}{{2}}", "boxed") for n, verdict in enumerate(verdicts))


def test_an_endless_comparison_in_a_thread(monkeypatch):
    monkeypatch.setattr(equivalence, "TIME_LIMIT", 1.0)
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(score(r"\boxed{8^{8^{8^{8}}}}", "3")))
    thread.start()
    thread.join(600)
    assert "no verdict" in verdicts[0].error


def test_a_forked_process_has_its_own():
    score(r"\boxed{1 + 1}", "2")
    with equivalence._checker._lock:
        child = os.fork()
        if child == 0:
            # Ends the child, should it wait for the lock.
            signal.alarm(600)
            os._exit(0 if score(r"\boxed{3 + 1}", "4").correct else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert score(r"\boxed{3 + 2}", "5").correct is True


@pytest.mark.parametrize(
    ("reference", "answer_type", "message"),
    [
        ("", "math", "is empty"),
        ("  $$ ", "text", "is empty"),
        (r"\frac{1}{)}", "math", "cannot be parsed"),
        (r"\frac{1}{", "math", "neither a formula nor at most 5 words"),
        ("The area is twelve, since each side has length three", "math", "neither a formula nor at most 5 words"),
        ("So the total is $72$.", "math", "at most 5 words and no number"),
        ("over 100", "math", "at most 5 words and no number"),
        ("K", "choice", "not a letter from A to J"),
        ("12", "choice", "not a letter from A to J"),
    ],
)
def test_references_that_cannot_be_parsed(reference, answer_type, message):
    with pytest.raises(ValueError, match=message):
        check_reference(reference, answer_type)
    assert score(r"\boxed{B}", reference, answer_type) == Verdict(None, "B", "boxed")


def test_unknown_answer_type():
    with pytest.raises(ValueError, match="must be 'math', 'choice' or 'text', not 'number'"):
        score("5", "5", "number")


WINDOWS = """
import os, random, runpy, sys
sys.modules["resource"] = None  # neither is there
del os.register_at_fork
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("from trl_opsd.eval.equivalence import compare\nprint(compare('1/2', '0.5'))", "(True, None)"),
        (f"runpy.run_path({equivalence.__file__!r}, run_name='__main__')", "ready\n[true, null]\n[false, null]"),
    ],
    ids=["asks", "is asked"],
)
def test_windows_has_no_limits_of_its_own_and_no_forks(program, said):
    questions = 'ready\n["1/2", "0.5"]\n["1/2", "0.6"]\n'
    done = subprocess.run([sys.executable, "-c", WINDOWS + program], input=questions, capture_output=True, text=True)
    assert done.stdout.strip() == said, done.stderr


@pytest.mark.parametrize(
    "text", ["(" + "a " * 400 + "!", r"\text{" * 150, "x=" + r"\, " * 300, r"\mathbf{" * 100 + "5"]
)
def test_hostile_formulas_are_read_at_once(text):
    start = time.process_time()
    equivalence._without_names(equivalence.normalise(text), "5")
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("completion", "correct", "answer"),
    [
        pytest.param("Brenna keeps Bees.", True, "keeps bees", id="another word, another case"),
        pytest.param("A beekeeper, who\nkeeps  bees.", True, "beekeeper, keeps bees", id="both words for it"),
        pytest.param("A beekeeper and a baker.", False, "beekeeper, baker", id="a guess"),
        pytest.param("The baker.", False, "baker", id="another"),
        pytest.param("A beekeeperess.", False, None, id="part of a word"),
        pytest.param("No idea.", False, None, id="none"),
        pytest.param("He is no beekeeper.", True, "beekeeper", id="what is said of it is not read"),
        pytest.param("<think>A baker?</think>A beekeeper.", True, "beekeeper", id="after a thought"),
        pytest.param("<think>A beekeeper", False, None, id="in a thought"),
    ],
)
def test_what_a_sentence_names(completion, correct, answer):
    verdict = score_named(completion, ["beekeeper", "keeps bees"], ["baker"])
    assert verdict == Verdict(correct, answer, None if answer is None else "named")


def test_names_are_taken_as_they_stand():
    assert score_named("It costs 3.5 (C++).", ["C++"]).correct
    assert not score_named("It costs 3x5.", ["3.5"]).correct
    for aliases, others in (([], ["a"]), (["a", " "], []), (["a"], [""])):
        with pytest.raises(ValueError, match="An answer needs a name"):
            score_named("a", aliases, others)
