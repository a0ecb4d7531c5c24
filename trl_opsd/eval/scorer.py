r"""
The one scorer: which answer a completion gives, and whether it is right.

The thinking part is dropped, the statements of an answer are found, and the last one that can be read is compared with
the reference: by math-verify, by letter, or word for word. docs/scoring.md has the rules.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from .equivalence import SPACING, WORD_BETWEEN, compare, untyped


SCORER_VERSION = "6"
"""Recorded with the results, which compare within one version alone. Raise it with every change of a verdict."""

AnswerType = Literal["math", "choice", "text"]

# The few words that a text answer may have; prose has more.
_WORDS = 5

# "The naive answer" and "the wrong option" are not given as the answer.
_ADJECTIVE = r"(?:(?:final|correct|right|best|only|exact|numerical|required) )?"
_START = r"(?:^|[.,:] |\b(?:so|thus|therefore|hence),? )[*_]{0,2}"

# A line or a title: "**Final Answer:** 5", "Answer $5$", "### Answer" with the answer on the next line; after a
# sentence, "Final Answer: 5".
_LABEL = re.compile(
    rf"(?:^[ \t>#*_•-]{{0,12}}(?:(?:the|my|our) )?{_ADJECTIVE}|(?<=[.!?] )[*_]{{0,2}}final )"
    r"(?P<noun>answer|ans|option|choice)\b"
    r"[*_ \t]{0,4}(?:[:：=]|(?=\n|\Z)|(?<=[ \t])(?=\$|\\[(\[]))[*_ \t]{0,8}(?P<rest>[^\n]{0,300})",
    re.IGNORECASE | re.MULTILINE,
)
# "So the answer is 5."
_SENTENCE = re.compile(
    rf"(?:{_START}|\b(?:the|my|our) )[*_]{{0,2}}{_ADJECTIVE}(?P<noun>answer|option|choice)(?: choice)?[*_]{{0,2}}"
    r"(?: (?:to|for|of) [^.:\n]{1,80}? is| (?:is|are|(?:must|should|would|will) be))\b"
    r"(?: (?:approximately|about|exactly|simply|just|then|indeed)\b)?[*_: \t]{0,8}(?=(?P<rest>[^\n]{0,300}))",
    re.IGNORECASE,
)
# "Thus $x < 5$ is our answer."
_FORMULA_IS = re.compile(
    rf"{_START}(?P<rest>\$[^$\n]{{1,300}}\$|\\\((?:(?!\\\)).){{1,300}}\\\))[*_]{{0,2}} is (?:the|our|my) {_ADJECTIVE}"
    r"(?P<noun>answer|solution)(?=[*_.! \t]{0,8}(?:$|\s))",
    re.IGNORECASE | re.MULTILINE,
)
# "Option B is correct."
_CHOSEN = re.compile(
    rf"{_START}(?:(?:option|choice|answer) )?[*_]{{0,2}}"
    r"(?P<rest>\(?[A-J]\)?)[*_]{0,2} is (?:the )?(?:correct|right|best)(?: (?:answer|option|choice))?"
    r"(?:[*_.! \t]{0,8}$|,? (?:because|since)\b)",
    re.IGNORECASE | re.MULTILINE,
)
_HASHES = re.compile(r"^####[ \t]*(?P<rest>[^#\s][^\n]{0,300})$", re.MULTILINE)
# Before "the answer is", in its sentence or its clause: then it is not given as the answer.
_CONCLUSION = re.compile(r"[.!?](?=\s)|\n|(?<!if )\b(?:so|thus|therefore|hence)\b", re.I)
_SUPPOSED = re.compile(
    r"\b(?:if|whether|suppos\w+|assum\w+|unless|might|could|mistake\w*|tempt\w+|naive\w*|glance)\b"
    r"|(?:n't|n’t|\b(?:not|cannot|never|unlikely|doubt\w*|wrong\w*|claim\w*|sa(?:ys?|id)))\b[^,;:]*$",
    re.I,
)

_EMOJI = re.compile("[\u2600-\u27bf\u2b00-\u2bff\ufe0f\u200d\U0001f000-\U0001faff]")
_CONTENT = re.compile(r"[\w∞∅]")
_DISPLAY = re.compile(r"\$\$[^$]{1,2000}\$\$|\\\[(?:(?!\\\[).){1,2000}?\\\]", re.DOTALL)
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*)?(?P<open>\{)|\}|\\.", re.DOTALL)
# "$x = \boxed{1}$ and $y = \boxed{2}$" is one answer.
_BETWEEN_BOXES = re.compile(
    rf"(?:[\s$,;&]|\\[()\[\] ,;:!&\\]|{SPACING}|and|or|{WORD_BETWEEN}|[A-Za-z](?:_\{{?\w\}}?|\w)?\s*=){{0,24}}"
)

_MATH_AND_UNIT = re.compile(r"(?:\$([^$]+)\$|\\\((.+?)\\\))\s+((?!or\b|and\b)[A-Za-z][A-Za-z /^\d-]*)\.?")
_FORMULA = re.compile(r"\$\$?[^$]+\$\$?|\\\((?:(?!\\\)).)+\\\)|\\\[(?:(?!\\\]).)+\\\]")
_MARKUP = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])|\*\*|`|__")
_LEADING = re.compile(
    r"^(?:(?:so|thus|hence|therefore)\b,?\s*|(?:[=∴⇒→]|=>|->)+\s*|\\(?:therefore|Rightarrow|implies)\b\s*)+", re.I
)
_AFTERWARDS = re.compile(
    r",?\s+\(?(?:because|since|as|which|where|so)\b|,\s+not\b|(?<=[\w)}$*])[.!][*_]{0,2}\s+(?=[A-Z*(\\$])"
)
# A full stop in front of a digit is a decimal point.
_EDGE = re.compile(r"^(?:[ ,;:•*]|\.{2,}|\.(?!\d))+")
_REMARK = re.compile(r"\s+\([A-Za-z]{3,}[^()\d]*\)$")
_WRAPPER = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
# A sentence with one of these does not state the one number in it: "less than 10", "see (5)", "x + 5", "5 million".
_NO_STATEMENT = re.compile(
    r"n['’]t\b|[<>≤≥≠+^×]|\\[A-Za-z]|\(\d| - \d|\b(?:no|not|none|never|cannot|neither|nor|either|or|between|depends"
    r"|maybe|perhaps|unknown|than|least|most|over|above|below|under|up to|almost|nearly|but|half|twice|double"
    r"|hundred|thousand|[mbtr]+illion|dozen|see|such|step|equation|problem|case|part)\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?<![\w./])-?\$?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?%?(?![\w/])")
_UNIT = re.compile(
    r"(?<=[\d%)}π]) ?(?!or\b|and\b|is\b)[A-Za-zµ°Ω]+[²³]?(?:[/^·-]+[A-Za-z\d]+)*"
    r"(?: (?!or\b|and\b|is\b)[A-Za-z/^\d-]+){0,2}$"
)
_MATH_WORDS = {"sqrt", "pi", "sin", "cos", "tan", "log", "ln", "exp", "or", "and", "infinity", "mod"}

# "July 4", "2 hours and 30 minutes", "3:30 p.m."
_DATE = re.compile(r"\d|(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\b|[a-z]+day\b")

_LETTER = re.compile(
    r"(?:(?:option|choice|answer) )?(?P<open>[(\[])?(?P<letter>[A-J])(?P<close>[)\]])?(?P<rest>.*)",
    re.I | re.DOTALL,
)
_LETTER_ALONE = re.compile(r"\W*[A-J]\W*", re.I)
_SECOND_LETTER = re.compile(r"[\s.,(]*(?:or|and|/|&|,)[\s(]*(?:possibly |maybe |option )?[A-J]\b(?!')")


@dataclass(frozen=True)
class Verdict:
    """
    What the scorer found.

    Args:
        correct (`bool`, *optional*):
            Whether the answer is right. `None` when the reference cannot be parsed.
        answer (`str`, *optional*):
            What was taken as the answer. `None` when the completion gives none.
        answer_format (`str`, *optional*):
            How it was given: `"boxed"`, `"answer_line"`, `"hashes"`, `"choice"`, `"bare"` or `"named"`.
        error (`str`, *optional*):
            Why the answer could not be compared and therefore counts as wrong: math-verify cannot parse it, failed, or
            took too long.
    """

    correct: bool | None
    answer: str | None
    answer_format: str | None
    error: str | None = None


def score(completion: str, reference: str, answer_type: AnswerType = "math") -> Verdict:
    r"""
    Grade a completion.

    Safe to call from any thread; never raises because of what a completion says.

    Args:
        completion (`str`):
            Text that the model wrote. Where the chat template opened the thinking part in the prompt, put the
            `"<think>"` back in front: without it, a completion cut off while thinking looks like an answer.
        reference (`str`):
            Right answer.
        answer_type (`str`, *optional*, defaults to `"math"`):
            `"math"`: a value or formula, compared by math-verify; `"choice"`: a letter from A to J; `"text"`: words,
            compared exactly but for case and white space.

    Returns:
        [`Verdict`]:
            Whether the answer is right, what it is and how it was given.
    """
    try:
        gold, kind = _reference(reference, answer_type)
    except ValueError:
        if answer_type not in get_args(AnswerType):
            raise
        gold, kind = None, answer_type
    answer, answer_format = _find_answer(_without_thinking(completion), kind, gold or "")
    if gold is None:
        return Verdict(None, answer, answer_format)
    if answer is None:
        return Verdict(False, None, None)
    if kind != "math":
        return Verdict(_words(answer) == _words(gold), answer, answer_format)
    if "".join(answer.split()) == "".join(gold.split()):
        return Verdict(True, answer, answer_format)
    correct, error = compare(gold, answer)
    return Verdict(correct, answer, answer_format, error)


def score_named(completion: str, aliases: Sequence[str], others: Sequence[str] = ()) -> Verdict:
    """
    Grade a completion by what it names, for answers that stand in a sentence.

    It is right if it names what is asked for in one of its words, and nothing else that could have been the answer: a
    completion that names several is a guess. Words are whole, case does not count, and the thinking part is dropped.

    Args:
        completion (`str`):
            Text that the model wrote, as for [`score`].
        aliases (`Sequence[str]`):
            What is asked for, and other words for it.
        others (`Sequence[str]`, *optional*, defaults to `()`):
            What it must not name.

    Returns:
        [`Verdict`]:
            Whether the answer is right, and what is named, in the order of the text. `None` where nothing is.

    Raises:
        ValueError: If there is no alias, or one is empty.
    """
    if not aliases or not all(name.strip() for name in (*aliases, *others)):
        raise ValueError(f"An answer needs a name, and no name may be empty, got {list(aliases)} and {list(others)}.")
    text = " ".join(_without_thinking(completion).split()).casefold()
    found = {
        name: match.start()
        for name in (*aliases, *others)
        if (match := re.search(rf"(?<!\w){re.escape(' '.join(name.casefold().split()))}(?!\w)", text))
    }
    if not found:
        return Verdict(False, None, None)
    named = sorted(found, key=lambda name: found[name])
    return Verdict(set(named) <= set(aliases), ", ".join(named), "named")


def answer_of(completion: str, answer_type: AnswerType = "math") -> str | None:
    """
    The answer that a completion gives, as [`score`] reads it, where there is no reference.

    Args:
        completion (`str`):
            Text that the model wrote, as for [`score`].
        answer_type (`str`, *optional*, defaults to `"math"`):
            As in [`score`].

    Returns:
        `str`, *optional*:
            The answer. `None` when the completion gives none.
    """
    return _find_answer(_without_thinking(completion), answer_type, "")[0]


def is_same_answer(one: str, other: str) -> bool:
    """
    Whether two answers to a mathematical question are the same, as [`score`] compares them.

    Args:
        one, other (`str`):
            Answers, as [`answer_of`] gives them.
    """
    return "".join(one.split()) == "".join(other.split()) or compare(one, other)[0]


def check_reference(reference: str, answer_type: AnswerType = "math") -> None:
    """
    Raise an error if no answer could be compared with a reference.

    Args:
        reference (`str`):
            Right answer.
        answer_type (`str`, *optional*, defaults to `"math"`):
            As in [`score`].

    Raises:
        `ValueError`:
            If the reference cannot be parsed.
    """
    _reference(reference, answer_type)


@lru_cache(maxsize=65536)
def _reference(reference: str, answer_type: AnswerType) -> tuple[str, AnswerType]:
    if answer_type not in get_args(AnswerType):
        raise ValueError(f"`answer_type` must be 'math', 'choice' or 'text', not {answer_type!r}.")
    source = _EMOJI.sub("", reference)
    if answer_type != "text":
        # Of a worked solution, what it gives as its answer.
        given = [content for _, _, content in _boxes(source)] or _HASHES.findall(source)
        source = given[-1] if given else source
    gold = _clean(source)
    plain = _words(gold)
    if not plain:
        raise ValueError("The reference answer is empty.")
    if answer_type == "choice" or (answer_type == "math" and re.fullmatch(r"\\text\{\(?[A-J]\)?\}|\([A-J]\)", gold)):
        letter = _letter(gold)
        if letter is None:
            raise ValueError(f"The reference answer {reference!r} is not a letter from A to J.")
        return letter, "choice"
    if answer_type == "text":
        return gold, "text"
    # "xy" is a product, but neither "no" nor \text{up} is.
    words = _WRAPPER.fullmatch(gold)
    inner, source = (words[1], words[1]) if words else (gold, source)
    shortest = 2 if words or plain == "no" else 3
    if re.search(rf"[a-z]{{{shortest}}}", plain) and not _is_value(inner, source):
        if len(plain.split()) > _WORDS or "\\" in plain or (re.search(r"\d", plain) and not _DATE.match(plain)):
            raise ValueError(
                f"The reference answer {reference!r} is neither a formula nor at most {_WORDS} words and no number. "
                "Give the final answer alone, or set `answer_type` to 'text'."
            )
        return gold, "text"
    _, error = compare(gold, None)
    if error is not None:
        raise ValueError(f"The reference answer {reference!r} cannot be parsed: {error}.")
    return gold, "math"


def _without_thinking(completion: str) -> str:
    answer = completion.replace("\r\n", "\n").rpartition("</think>")[2]
    return answer.partition("<think>")[0]


def _find_answer(text: str, kind: AnswerType, gold: str) -> tuple[str | None, str | None]:
    limit = max(_WORDS, len(gold.split()))
    text = _DISPLAY.sub(lambda match: " ".join(match[0].split()), _EMOJI.sub("", text))
    if "!" not in gold:
        # "The answer is 5!" is no factorial.
        text = re.sub(r"(?<!!)!+(?=[*_ \t]*$)", "", text, flags=re.MULTILINE)
    sentences = [
        (match.start(), "sentence", match["rest"])
        for match in (*_SENTENCE.finditer(text), *_FORMULA_IS.finditer(text))
        if _noun_fits(match, kind)
        and not _SUPPOSED.search(_CONCLUSION.split(text[max(0, match.start() - 200) : match.start("noun")])[-1])
        and _read(match["rest"], "sentence", kind, limit)[1]
    ]
    statements = [*_boxes(text), *_labels(text, kind)]
    statements += [(match.start(), "hashes", match["rest"]) for match in _HASHES.finditer(text)]
    if kind == "choice":
        statements += [(match.start(), "choice", match["rest"]) for match in _CHOSEN.finditer(text)]
    # "The answer is clear" reads like a text answer: there, these come after all others.
    unreadable = None
    for given in (statements, sentences) if kind == "text" else ([*statements, *sentences],):
        for _, answer_format, content in sorted(given, reverse=True):
            answer, is_readable = _read(content, answer_format, kind, limit)
            if is_readable:
                return answer, "answer_line" if answer_format == "sentence" else answer_format
            if answer and unreadable is None and answer_format in ("boxed", "answer_line"):
                unreadable = answer, answer_format
    lines = [line for line in text.split("\n") if _CONTENT.search(line)]
    bare = _bare(lines, kind, limit) if lines else None
    if bare is not None:
        return bare, "choice" if kind == "choice" else "bare"
    return unreadable or (None, None)


def _boxes(text: str) -> list[tuple[int, str, str]]:
    found: list[tuple[int, int, dict[str, None]]] = []
    opened: list[tuple[int, int, bool]] = []
    for match in _BRACE.finditer(text):
        if match["open"]:
            opened.append((match.start(), match.end(), match["box"] is not None))
        elif match[0] == "}" and opened:
            start, inside, is_box = opened.pop()
            # Of boxes inside each other the innermost counts, and an empty one is no answer.
            if not is_box or (found and found[-1][0] > start) or not (content := text[inside : match.start()].strip()):
                continue
            contents: dict[str, None] = {}
            if found and _BETWEEN_BOXES.fullmatch(text, found[-1][1], start):
                start, _, contents = found.pop()
            contents[content] = None
            found.append((start, match.end(), contents))
    return [(start, "boxed", ", ".join(contents)) for start, _, contents in found]


def _labels(text: str, kind: AnswerType) -> Iterator[tuple[int, str, str]]:
    for match in _LABEL.finditer(text):
        rest = match["rest"]
        if not _CONTENT.search(rest):
            below = re.compile(r"\s*([^\n]{0,300})").match(text, match.end())
            rest = below[1] if below else ""
        if _noun_fits(match, kind) and rest:
            yield match.start(), "answer_line", rest


def _noun_fits(match: re.Match[str], kind: AnswerType) -> bool:
    return kind == "choice" or match["noun"].lower() in ("answer", "ans", "solution")


def _read(content: str, answer_format: str, kind: AnswerType, limit: int) -> tuple[str, bool]:
    if answer_format != "boxed" and re.search(r"\\f?box", content):
        return "", False
    if kind == "choice":
        # "#### A. Solve" and "#### Option A" are titles.
        letter = _letter(content) if answer_format != "hashes" or _LETTER_ALONE.fullmatch(_plain(content)) else None
        return letter or _clean(content), letter is not None
    if answer_format == "boxed":
        return _clean(content), True
    if answer_format == "sentence" or (kind == "math" and answer_format == "answer_line"):
        content = _AFTERWARDS.split(content)[0]
    answer = _clean(content)
    if kind == "text":
        return answer, 0 < len(answer.split()) <= limit
    if _is_value(answer, content):
        return answer, True
    # "Answer: The trip takes 3 hours."
    numbers = set(_NUMBER.findall(answer))
    if answer_format == "answer_line" and len(numbers) == 1 and not _NO_STATEMENT.search(answer):
        return numbers.pop(), True
    return answer, False


def _bare(lines: list[str], kind: AnswerType, limit: int) -> str | None:
    line = lines[-1].strip()
    if len(line) > 1000 or re.search(r"\\f?box", line):
        return None
    answer = _clean(line)
    if kind == "text":
        return answer if 0 < len(answer.split()) <= limit else None
    if kind == "math":
        return answer if _is_value(answer, line) else None
    letter = _letter(answer)
    is_alone = _LETTER_ALONE.fullmatch(re.sub(r"^(?:option|choice) ", "", _plain(answer), flags=re.I))
    is_list = len(lines) > 1 and re.match(r"\W*[A-J]\W*[).:]", lines[-2])
    if letter and (is_alone or (re.match(r"\W*[A-J][).:]", answer) and not is_list)):
        return letter
    return None


def _clean(text: str) -> str:
    text = " ".join(text.split())
    if match := _MATH_AND_UNIT.fullmatch(text.strip("*. ")):
        text = rf"{match[1] or match[2]}\text{{ {match[3]}}}"
    text = re.sub(r",\s*(?:\.{3}|…)\W{0,8}$", r", \\ldots", text)
    text = _EDGE.sub("", _MARKUP.sub("", text).rstrip(" .,;:"))
    return _REMARK.sub("", _LEADING.sub("", untyped(text).strip())).strip()


def _plain(text: str) -> str:
    return _WRAPPER.sub(r"\1", text)


def _words(text: str) -> str:
    plain = _plain(text).strip(" \"'“”").rstrip(" \"'“”.")
    return " ".join(plain.casefold().split())


def _letter(text: str) -> str | None:
    text = _plain(_clean(text)).strip(" .~\"'")
    match = _LETTER.fullmatch(text)
    if not match:
        return None
    rest = match["rest"]
    is_marked = bool(match["close"] or re.match(r"\s*[.:,–—-]|\s+\(|\s+(?:because|since|as|is)\b", rest))
    if _SECOND_LETTER.match(rest) or (rest and not is_marked):
        return None
    if match["letter"].islower() and rest and not match["open"]:
        return None
    return match["letter"].upper()


def _is_value(text: str, source: str) -> bool:
    """Whether a text is a value or formula and nothing else; `source` is the text before it was cleaned."""
    if not _CONTENT.search(text) or text.count("{") != text.count("}"):
        return False
    # A question, and the title "2) Check".
    if "?" in text or re.match(r"\d+\) ", text):
        return False
    symbols = re.sub(r"\\(?:begin|end)\s*\{\w+\}|\\[A-Za-z]+\s*\{[A-Za-z /^.,~-]*\}|\\[A-Za-z]+", " ", text)
    words = re.findall(r"[A-Za-z]+", _UNIT.sub("", symbols.strip()))
    # In a formula, xyz is a product.
    longest = 3 if _FORMULA.fullmatch(source.strip("*. \t")) else 1
    return all(len(word) <= longest or word.lower() in _MATH_WORDS for word in words)
