r"""
Whether two answers are the same, by math-verify in a process of its own.

math-verify limits its time with `signal.alarm`, which works in the main thread alone and does not interrupt a single
long operation such as `9^{9^9}`. A process can be stopped from any thread, whatever it is doing. This file is also the
program that runs there, and imports nothing of trl-opsd so that it starts quickly.
"""

import atexit
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from operator import itemgetter
from typing import Any


with suppress(ImportError):  # on Windows
    import resource


TIME_LIMIT = 10.0
"""Seconds for one comparison, which typically takes milliseconds."""

_START_LIMIT = 120.0
_LONGEST = 1000
_CLOSE = 1e-5

_SYMBOLS = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/", "π": r"\pi ",
        "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ",
        "∈": r"\in ", "∅": r"\emptyset ", "≈": r"\approx ", "θ": r"\theta ", "°": r"^\circ ", "½": " 1/2", "¼": " 1/4",
        "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    }
)  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")

_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)"
_TEXT = r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*"
# Other commands that say how something is set, and nothing about its value
_TYPE = re.compile(
    r"\\(?P<command>math(?:bf|sf|it|tt|normal|rm)|boldsymbol|bm|pmb|underline|uline|emph"
    r"|text(?:rm|bf|it|sf|tt|up|sc|normal)?|mbox|hbox|operatorname)\s*(?P<open>\{)|\{|\}|\\."
)
_SIZE = re.compile(
    r"\\(?:tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|bf|it|rm|sf|tt|em|bfseries|itshape"
    r"|(?:display|text|script)style|left|right|[bB]ig{1,2}[lr]?)(?![A-Za-z])"
)
SPACING = r"(?:~|\\>|\\(?:hspace\*?\s*\{[^{}]*\}|(?:q?quad|(?:thin|med|thick|en)?space|hfill)(?![A-Za-z])))"
"""LaTeX that only keeps things apart, but for what also stands within numbers (`1\\,000`)."""
WORD_BETWEEN = r"\\(?:text(?:normal|rm|bf|it|sf|up)?|mathrm|mathbf|mbox|hbox)\s*\{(?:[\s~,;]|\b(?:and|or)\b)*\}"
"""LaTeX of a word or a comma that stands between two values."""
_SPACE = r"(?:\s|~|\\[,;:! ])*"
_MAGNITUDES = {
    "dozen": "12", "hundred": "10^{2}", "thousand": "10^{3}", "million": "10^{6}", "billion": "10^{9}",
    "trillion": "10^{12}",
}  # fmt: skip
_MAGNITUDE = re.compile(rf"(?<=\d){_SPACE}({_TEXT}\{{)?\s*({'|'.join(_MAGNITUDES)})\b")
# Other single letters, "i" and "r^2" among them, are variables, and these words are part of what is said.
_LETTER_UNIT = r"[mgsLVAJNWKCFΩÅ]"
_SHORT_UNIT = r"(?:[mck]m|nm|mg|kg|ms|ns|m[lL]|[kM]?Hz|[kMG]?eV|kJ|kW|k?Pa|mph|km/h|m/s|min|hrs?)"
_NO_UNIT = (
    r"\b(?:or|and|to|if|when|where|for|mod|more|less|sqrt|infinity|sin|cos|tan|log|exp"
    r"|(?:hundred|thousand|[mbtr]+illion|dozen|tenth)\w*)\b"
)
_EXPONENT = r"(?:\^?\{?-?\d\}?)?"
_LETTER_WORD = rf"{_LETTER_UNIT}{_EXPONENT}(?![A-Za-z])"
_UNIT_WORD = (
    rf"(?!{_NO_UNIT})(?:{_SHORT_UNIT}\b|[µμ][A-Za-z]|(?:ft|in|lb|oz|mi|mA|kN|kV|MW)\b|[A-Za-z]{{3,}}(?:-[A-Za-z]+)*\.?)"
    rf"{_EXPONENT}"
)
_ANY_UNIT = rf"(?:{_UNIT_WORD}|{_LETTER_WORD})"
_UNIT_TEXT = (
    rf"{_TEXT}\{{(?!\s*(?!{_LETTER_UNIT})[A-Za-z]\s*\}})(?![^{{}}]*(?:{_NO_UNIT}|\s\d))(?:[^{{}}]|\{{-?\d\}})*\}}"
    r"(?:\^\{?-?\d\}?)?"
)
# The repetitions are possessive: "m/s" is one unit or two, and all ways to read a row of them would be tried.
_UNIT = re.compile(
    # \text{ cm}^2
    rf"(?:(?<=[\d)}}])|(?<=\\pi)|(?<=\\pi )|(?<=[\d)}}][A-Za-z]))"
    rf"(?:{_SPACE}{_UNIT_TEXT}(?:{_SPACE}(?:/|\\cdot))?)++{_SPACE}$"
    # 5km
    rf"|(?<=\d){_SHORT_UNIT}(?:\^?\d)?$"
    # 5 kg, 5 m/s, 5 m s^-2, 5 cups of flour
    rf"|(?:(?<=[\d)}}])|(?<=\\pi)|(?<=\\pi ))\s+{_ANY_UNIT}(?:\s*[/*·]\s*{_ANY_UNIT}"
    rf"|\s+(?:{_UNIT_WORD}|(?:of|in|an?)\b|(?<=[A-Za-z]{{2}}\s){_LETTER_WORD}|{_LETTER_UNIT}\^?\{{?-\d\}}?))*+$"
)
_NAME = (
    r"(?:[A-Zfgh]\([^()]*\)|\|[A-Z]{1,2}\||[A-Za-z](?:\s*\+\s*[A-Za-z])+|[A-Za-z]|\\[A-Za-z]+\b)"
    r"(?:[A-Za-z ']|\\[A-Za-z]+\b|_(?:\{\w+\}|\d+|[A-Za-z])|\{[A-Za-z ]*\}|\((?:[A-Za-z]|,\s?)*\))*"
)
_OPERATOR = r"\\(?:cdot|times|div|[dt]?frac|sqrt|pi|pm|binom|sin|cos|tan|log|ln)(?![A-Za-z])"
# What it stands in front of is computed, so an equation with it states a value
_COMPUTED = re.compile(r"\\(?:lim|int|sum|prod|max|min|gcd)(?![A-Za-z])")
_GOES_ON = re.compile(r",\s*\\[lc]?dots$")
# "for any constant c", "where n is an integer"
_QUALIFIER = re.compile(
    r"(?<=\S)[,;\s]*(?:\\text\{[\s,(]*|(?<=[\s,;]))"
    r"(?:for (?:any|all|every|each|some|arbitrary)|where|with \w+ (?:(?:an|any|some) )?(?:constant|real|integer))\b.*$"
)
_MODULUS = re.compile(
    r"(?<=\S)[,\s]*(?:\\pmod\s*\{?(?P<first>\w+)\}?"
    r"|\(?\s*(?:\\b?mod\b|\\(?:text|mathrm|operatorname)\{\s*mod\s*\}|mod\b)(?:\s|\\ )*\{?(?P<second>\w+)\}?\s*\)?)$"
)
# ", c \in \mathbb{R}" of a variable that stands before it
_DOMAIN = re.compile(
    r"(?<=\S)\s*(?<!\\)[,;(](?:[,;(\s]|\\[,;:! ])*(?P<name>[A-Za-z])(?:\s*,\s*[A-Za-z])*\s*\\in\s*"
    r"(?:\\mathbb\s*|\\)?\{?[A-Z]\}?(?:[_^](?:\{[^{}]*\}|[\w+*]))*\s*\)?$"
)
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d{0,20})\\(?:overline|bar)\s*\{(\d{1,20})\}")
_BASE = re.compile(r"\d_\{?(\d+)\}?$")
_NAMES = r"\(\s*(?:[A-Za-z](?:_(?:\{\w+\}|\w))?[\s,]*+)++\)"
_ASSIGNMENT = re.compile(
    rf"(^|,|;|(?:\\text\{{\s*)?\b(?:or|and)\b\s*\}}?)(\s*)({_NAME}|{_NAMES})\s*(?:=|\\approx|\\equiv|\\in\b)\s*(?=\S)"
)


def normalise(text: str) -> str:
    r"""
    The value of an answer, in the LaTeX that math-verify reads: without unit, currency, thousands separators.

    Args:
        text (`str`):
            Answer, without math delimiters.

    Returns:
        `str`:
            The answer's value.
    """
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(r"√\s*(\w+|\([^()]*\))", r"\\sqrt{\1}", text.translate(_SYMBOLS))
    text = re.sub(r"^\s*\\approx\b|\\(?:text)?color\s*\{\w+\}", "", text)
    text = re.sub(SPACING, " ", untyped(re.sub(WORD_BETWEEN, _between, text)))
    text = _QUALIFIER.sub("", _MODULUS.sub("", text))
    domain = _DOMAIN.search(text)
    if domain and re.search(rf"(?<![\\A-Za-z]){domain['name']}(?![A-Za-z])", text[: domain.start()]):
        text = text[: domain.start()]
    text = re.sub(r"(?<!\\)\\&", r"\\text{ and }", text)
    text = re.sub(r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?", r"\\overline{\1\2\3}", text)
    text = _REPEATING.sub(_fraction, re.sub(r"\\dot\s*\{?(\d)\}?", r"\\overline{\1}", text))
    text = " ".join(text.split()).rstrip(" .,;:")
    text = re.sub(r"^[-+]?\\?[$€£¥]|\\\$|[€£¥]", lambda match: match[0][0] if match[0][0] in "-+" else "", text)
    text = re.sub(r"(?:\s|\\[ ,;])*(?:\bper ?cent\b|\\text\{\s*(?:per ?cent|\\?%)\s*\}|(?<!\\)%|\\%)", r"\\%", text)
    text = re.sub(r"\s*\^\s*\{?\s*\\circ\s*\}?(?:\s*[CF]\b)?|\\degree", "", text)
    text = re.sub(r"(?<=\d)\s?(?:\\[,!]|\{,\})\s?(?=\d{3}(?!\d))", "", text)
    text = re.sub(rf"^{_TEXT}\{{([^{{}}]*)\}}$", r"\1", text)
    text = _MAGNITUDE.sub(lambda match: rf" \times {_MAGNITUDES[match[2]]}{match[1] or ''}", text)
    text = _UNIT.sub("", text).strip()
    if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?:\\%)?", text):
        text = text.replace(",", "")
    text = re.sub(rf"(?<![\w.])({_NUMBER})[eE]([-+]?\d+)(?!\w)", r"\1 \\times 10^{\2}", text)
    text = re.sub(r"(?<=\d)\s*(?:\*|x(?=\s*10\s*\^))\s*10\b", r" \\times 10", text)
    text = re.sub(r"\^\s*\(([^()]*)\)|\^\s*([-+]?\d+)", lambda match: f"^{{{match[1] or match[2]}}}", text)
    text = re.sub(r"^([-+]?)(\d+)(?:\s|\\ )+(?:(\d+)/(\d+)|\\[dt]?frac\{(\d+)\}\{(\d+)\})$", _mixed_number, text)
    text = re.sub(r"(?<![\\A-Za-z])(pi|infinity|sqrt|sin|cos|tan|ln|log|exp)(?![A-Za-z])", r"\\\1", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text).replace(r"\infinity", r"\infty")
    text = text.replace(r"\varnothing", r"\emptyset")
    return re.sub(r"^\{(.*)\}$", r"\\{\1\\}", text)


def _between(match: re.Match[str]) -> str:
    word = re.search("and|or|[,;]", match[0])
    return "" if word is None else rf" \text{{ {word[0]} }} " if word[0].isalpha() else word[0]


def untyped(text: str) -> str:
    r"""
    A formula without the commands that only say how it is set: `\mathbf{\frac{1}{2}}` is `\frac{1}{2}`.

    Words keep a command around them, or they would be products; upright e and i are the constants.

    Args:
        text (`str`):
            Formula.

    Returns:
        `str`:
            The same formula. One that is too long to be compared comes back as it is.
    """
    if len(text) > _LONGEST:
        return text
    text = _SIZE.sub("", re.sub(rf"\{{\s*{_SIZE.pattern}([^{{}}]*)\}}", r"\1", text))
    levels: list[tuple[str, list[str]]] = [("", [])]
    position = 0
    for match in _TYPE.finditer(text):
        levels[-1][1].append(text[position : match.start()])
        position = match.end()
        if match[0].endswith("{") and match[0] != r"\{":
            levels.append((match["command"] or "", []))
        elif match[0] == "}" and len(levels) > 1:
            command, parts = levels.pop()
            levels[-1][1].append(_set_alone(command, "".join(parts)))
        else:
            levels[-1][1].append(match[0])
    levels[-1][1].append(text[position:])
    opened = "".join(
        f"{chr(92)}{command}{{" * bool(command) + "{" * (not command) + "".join(parts) for command, parts in levels[1:]
    )
    return "".join(levels[0][1]) + opened


def _set_alone(command: str, content: str) -> str:
    if not command:
        return f"{{{content}}}"
    words = re.fullmatch(r"\s*[A-Za-z][A-Za-z .'-]+", content)
    is_text = re.match(r"text|mbox|hbox|mathrm|operatorname", command)
    letters = re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", content))
    if content.strip() in ("e", "i") or not (words or (is_text and letters)):
        return f" {content}"
    known = command in ("text", "textrm", "textbf", "textit", "mathrm", "mathbf", "mbox", "operatorname")
    return rf"\{command if known else 'text'}{{{content}}}"


def _fraction(match: re.Match[str]) -> str:
    whole, first, repeated = match.groups()
    numerator = int(whole + first + repeated) - int(whole + first or 0)
    return rf"\frac{{{numerator}}}{{{10 ** len(first) * (10 ** len(repeated) - 1)}}}"


def _mixed_number(match: re.Match[str]) -> str:
    sign, whole, *parts = match.groups()
    numerator, denominator = (part for part in parts if part is not None)
    return rf"{sign}\frac{{{int(whole) * int(denominator) + int(numerator)}}}{{{denominator}}}"


def _length(text: str) -> int:
    """Number of elements of a list that is written without braces; those in brackets of their own count as one."""
    return 0 if text.startswith(r"\{") else 1 + len(_separators(text))


def _separators(text: str) -> list[re.Match[str]]:
    """What stands between the elements of such a list."""
    depth = [0]
    for character in text:
        depth.append(depth[-1] + (character in "([{") - (character in ")]}"))
    found = re.finditer(r"(?<!\\)[,;]|\b(?:or|and)\b|\\text\{\s*(?:or|and)\s*\}", text)
    return [match for match in found if depth[match.start()] == 0]


def _both_signs(text: str) -> str:
    r"""
    A list whose elements with one `\pm` inside of something are two: math-verify reads it between two terms alone.

    `\mp` in such an element is the other sign. Several of them may belong together or not, and are left.
    """
    starts, ends = [0], []
    for separator in _separators(text):
        ends.append(separator.start())
        starts.append(separator.end())
    elements = []
    for start, end in zip(starts, [*ends, len(text)], strict=True):
        element = text[start:end].strip()
        inside = element.count(r"\pm") == 1 and not re.match(r"[^{(\[]*\\pm(?![A-Za-z])", element)
        signs = [("+", "-"), ("-", "+")] if inside else []
        elements += [element.replace(r"\pm", plus).replace(r"\mp", minus) for plus, minus in signs] or [element]
    return ", ".join(elements) if len(elements) > len(starts) else text


def _without_names(text: str, other: str) -> str:
    """A value without the names in front of it, if what it is compared with has none: y = 2, x = 1 is 1, 2."""
    named = list(_ASSIGNMENT.finditer(text))
    if "=" in other or re.search(r"\b(?:no|not|never|cannot)\b", text) or not named or named[0].start() > 0:
        return text
    ends = [match.start() for match in named[1:]] + [len(text)]
    values = [(match[3], text[match.end() : end]) for match, end in zip(named, ends, strict=True)]
    return ", ".join(value.strip() for _, value in sorted(values, key=itemgetter(0)))


def _result(answer: str, reference: str) -> str:
    """What a computation ends in, if the reference is none: 3 + 4 = 7 answers 7, but an equation in x is no value."""
    if "=" in reference:
        return answer
    left, _, right = answer.rpartition("=")
    if _COMPUTED.match(left) and left.count("{") == left.count("}"):
        return right.strip()
    return answer if re.search(r"[A-Za-z<>,;]", re.sub(_OPERATOR, "", left)) else right.strip()


class _Checker:
    """The process, started when first asked and again whenever it had to be stopped."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, reference: str, answer: str | None) -> tuple[bool, str | None]:
        with self._lock:
            # One that was stopped by something else is no verdict: it gets a second chance.
            for _ in range(2):
                if self._process is None or self._process.poll() is not None:
                    self._process = self._start()
                start = time.monotonic()
                if reply := _exchange(self._process, json.dumps([reference, answer]), TIME_LIMIT):
                    same, error = json.loads(reply)
                    return same, error
                if time.monotonic() - start >= TIME_LIMIT:
                    return False, f"math-verify gave no verdict within {TIME_LIMIT:g} seconds"
        return False, "the process that runs math-verify died"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        if find_spec("math_verify") is None:
            raise ValueError("Grading mathematical answers needs math-verify: pip install 'trl-opsd[eval]'.")
        # -P: the modules beside this file must not hide those of the standard library. sympy's order of terms follows
        # the hash seed. In a session of its own, an interrupt from the terminal is left to the parent.
        process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        )
        if not _exchange(process, "ready", _START_LIMIT):
            raise RuntimeError("The process that runs math-verify did not start; its error is above.")
        return process


def _exchange(process: subprocess.Popen[str], line: str, limit: float) -> str:
    """Sends a line and returns the reply, or nothing if the process ended or had to be stopped."""
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(limit, process.kill)
    timer.start()
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
    except OSError:
        reply = ""
    except BaseException:
        # Interrupted: the reply would be taken for that to the next question
        process.kill()
        process.wait()
        raise
    finally:
        timer.cancel()
    if not reply:
        process.kill()
        process.wait()
    return reply


_checker = _Checker()
atexit.register(_checker.close)
# Two processes cannot share the pipes, and another thread may hold the lock.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_checker.reset)


@lru_cache(maxsize=65536)
def compare(reference: str, answer: str | None) -> tuple[bool, str | None]:
    r"""
    Compare an answer with the reference.

    Args:
        reference (`str`):
            Right answer, without math delimiters.
        answer (`str`, *optional*):
            Answer to compare. `None` checks the reference alone.

    Returns:
        `tuple[bool, str | None]`:
            Whether they are the same (without answer: whether the reference can be parsed), and why math-verify could
            not tell: its exception, or that it took longer than `TIME_LIMIT`.
    """
    for text in (reference, answer or ""):
        if len(text) > _LONGEST:
            return False, f"longer than {_LONGEST} characters"
    return _checker.ask(reference, answer)


# In the process: sympy and math-verify take a second to import, so the functions that need them do so.


def _read(text: str) -> Any:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # math-verify strips units from variables too: to it, 5t and 5 are the same.
    config = LatexExtractionConfig(
        boxed_match_priority=-1,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
        ),
    )
    parsed = parse(f"$${text}$$", [config], fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)
    if not parsed:
        raise ValueError(f"math-verify cannot parse {text!r}")
    return parsed[0]


def _is_same(reference: str, answer: str) -> bool:
    from math_verify import verify
    from sympy import Eq, FiniteSet, I, Interval, Tuple

    reference, answer = _without_names(reference, answer), _result(_without_names(answer, reference), reference)
    gold, given = _as_numbers(_read(reference), _read(answer))
    if isinstance(given, Eq) and "=" not in reference:
        return False
    # math-verify drops the dots of a list that goes on, and the base of a number.
    if bool(_GOES_ON.search(reference)) != bool(_GOES_ON.search(answer)):
        return False
    bases = {match[1] for match in map(_BASE.search, (reference, answer)) if match}
    if len(bases) > 1:
        return False
    # math-verify takes (1, 2) for {1, 2}.
    if any(
        text.startswith(r"\{") and isinstance(value, Interval | Tuple)
        for text, value in ((reference, given), (answer, gold))
    ):
        return False
    if isinstance(gold, FiniteSet) or isinstance(given, FiniteSet):
        # A set has no element twice, but a list has.
        twice = [
            max(0, _length(text) - (len(value) if isinstance(value, FiniteSet) else 1))
            for text, value in ((reference, gold), (answer, given))
        ]
        if twice[0] != twice[1]:
            return False
    is_exact = not re.search(r"\d\.|\.\d", reference + " " + answer)
    # Of numbers, math-verify compares six decimals, and knows none that are complex
    decides_alone = _is_number(gold) and _is_number(given) and (is_exact or gold.has(I) or given.has(I))
    if not decides_alone and not verify(
        gold, given, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True
    ):
        return _is_same_where_real(gold, given)
    return _agrees(gold, given, is_exact)


def _as_numbers(*values: Any) -> list[Any]:
    """With the imaginary unit, which is read as a variable, where there is no other variable."""
    from sympy import Basic, I

    free = set().union(*(value.free_symbols for value in values if isinstance(value, Basic)))
    if {str(symbol) for symbol in free} != {"i"}:
        return list(values)
    return [value.subs(dict.fromkeys(free, I)) if isinstance(value, Basic) else value for value in values]


def _is_number(value: Any) -> bool:
    from sympy import Expr, nan, oo, zoo

    return isinstance(value, Expr) and not value.free_symbols and not value.has(oo, -oo, zoo, nan)


def _agrees(gold: Any, given: Any, is_exact: bool) -> bool:
    """
    Whether the numbers are the same in two values that math-verify, which compares floats, takes for the same.

    What holds no numbers that could be told apart is left as it was found.
    """
    from sympy import And, Expr, FiniteSet, Interval, MatrixBase, Tuple, Union, simplify
    from sympy.core.relational import Relational

    gold, given = _beside(gold, given), _beside(given, gold)
    if isinstance(gold, Relational) and isinstance(given, Relational):
        return not is_exact or _is_same_relation(gold, given)
    for unordered in (FiniteSet, Union, And):
        if isinstance(gold, unordered) and isinstance(given, unordered) and len(gold.args) == len(given.args):
            return all(any(_matches(one, other, is_exact) for other in given.args) for one in gold.args)
    if isinstance(gold, Tuple | Interval) and isinstance(given, Tuple | Interval):
        return all(_agrees(*pair, is_exact) for pair in zip(gold.args, given.args, strict=False))
    if isinstance(gold, MatrixBase) and isinstance(given, MatrixBase):
        return all(_agrees(*pair, is_exact) for pair in zip(gold.flat(), given.flat(), strict=False))
    if _is_number(gold) and _is_number(given):
        return _is_same_number(gold.doit(), given.doit(), is_exact)
    if not (isinstance(gold, Expr) and isinstance(given, Expr)):
        return True
    if not (gold.free_symbols or given.free_symbols):
        return bool(gold.doit() == given.doit())  # an infinity
    return (
        not is_exact
        or simplify(gold - given) == 0
        or all(_is_zero(first - second) for first, second in _numbers(gold, given))
    )


def _matches(one: Any, other: Any, is_exact: bool) -> bool:
    """Whether two elements of sets are the same, which math-verify has not said of them."""
    one, other = _beside(one, other), _beside(other, one)
    return one.free_symbols == other.free_symbols and _agrees(one, other, is_exact)


def _beside(value: Any, other: Any) -> Any:
    """A value as math-verify reads it beside another: a chain of equations by its ends, a relation as what it says."""
    from sympy import And, Eq, Set
    from sympy.core.relational import Relational

    if isinstance(value, And) and all(isinstance(part, Eq) for part in value.args):
        parts = value._unsorted_args
        value = Eq(parts[0].lhs, parts[-1].rhs, evaluate=False)
    if not isinstance(value, Relational | And) or isinstance(other, Relational | And):
        return value
    if isinstance(value, Eq):
        return value.rhs
    return value.as_set() if isinstance(other, Set) else value


def _is_same_relation(gold: Any, given: Any) -> bool:
    """Whether one is a multiple of the other, or both have the same solutions."""
    from sympy import Eq, Expr, solve

    sides = [(relation.lhs, relation.rhs) for relation in (gold, given)]
    if (gold.lhs == given.lhs and gold.lhs.free_symbols) or not all(
        isinstance(side, Expr) for pair in sides for side in pair
    ):
        return all(_agrees(one, other, is_exact=True) for one, other in zip(*sides, strict=True))
    differences = _numbers(*(left - right for left, right in sides))
    if all(_is_zero(one * last - other * first) for (one, other), (first, last) in pairwise(differences)):
        return True
    if not (isinstance(gold, Eq) and isinstance(given, Eq)):
        return len(gold.free_symbols) == 1 and _agrees(gold.as_set(), given.as_set(), is_exact=True)
    variables = sorted(gold.free_symbols, key=str)
    one, other = (solve(equation, variables, dict=True) for equation in (gold, given))
    return len(one) == len(other) and all(
        any(
            first.keys() == second.keys() and all(_agrees(first[name], second[name], is_exact=True) for name in first)
            for second in other
        )
        for first in one
    )


def _numbers(gold: Any, given: Any) -> list[tuple[Any, Any]]:
    """What two formulas of the same variables are at some rational points, as far as they are numbers there."""
    from sympy import Rational, Symbol
    from sympy.core.function import AppliedUndef

    pair = [
        value.doit().replace(lambda part: isinstance(part, AppliedUndef), lambda part: Symbol(str(part)))
        for value in (gold, given)
    ]
    if pair[0].free_symbols != pair[1].free_symbols:
        return []
    found = []
    for start in (7, 23):
        point = {
            symbol: Rational(start + 4 * index, 3 + index)
            for index, symbol in enumerate(sorted(pair[0].free_symbols, key=str))
        }
        first, second = (value.subs(point).doit() for value in pair)
        if _is_number(first) and _is_number(second):
            found.append((first, second))
    return found


def _is_same_number(gold: Any, given: Any, is_exact: bool) -> bool:
    if is_exact:
        return _is_zero(gold - given)
    first, second = complex(gold), complex(given)
    distance = abs(first - second)
    if first.imag or second.imag:
        return distance <= min(1e-6, _CLOSE * abs(first))
    # The six decimals of 1.6e-19 and 1.7e-19 are zeros
    return first == second or distance <= _CLOSE * max(abs(first), abs(second))


def _is_zero(difference: Any) -> bool:
    if difference.is_Rational:
        return bool(difference == 0)
    # What is 0 to so many digits is 0
    return all(part == 0 or part._prec == 1 for part in difference.evalf(2, maxn=5000).as_real_imag())


def _is_same_where_real(gold: Any, given: Any) -> bool:
    """Whether two formulas are the same for positive variables, if nothing else makes both of them real."""
    from sympy import Expr, Rational, Symbol, simplify

    if not (isinstance(gold, Expr) and isinstance(given, Expr)) or gold.free_symbols != given.free_symbols:
        return False
    positive = {symbol: Symbol(symbol.name, positive=True) for symbol in gold.free_symbols}
    for symbol in positive:
        others = {other: Rational(7, 3) for other in positive if other != symbol}
        for value in (gold, given):
            found = value.subs(others).subs(symbol, Rational(-11, 7)).evalf()
            if not found.is_number or found.is_real:
                return False
    return bool(positive) and simplify(gold.subs(positive) - given.subs(positive)) == 0


def _compare(reference: str, answer: str | None) -> bool:
    if answer is None:
        return _read(_both_signs(normalise(reference))) is not None
    moduli = {match["first"] or match["second"] for match in map(_MODULUS.search, (reference, answer)) if match}
    if len(moduli) > 1:
        return False
    reference, answer = _both_signs(normalise(reference)), _both_signs(normalise(answer))
    if _is_same(reference, answer):
        return True
    return (r"\%" in reference) != (r"\%" in answer) and _is_same(
        *(text.replace(r"\%", "") for text in (reference, answer))
    )


def _main() -> None:
    import logging

    import math_verify  # noqa: F401  before the first question, whose time is limited

    logging.disable(logging.CRITICAL)
    # What a library prints must not get between the replies.
    replies, sys.stdout = sys.stdout, sys.stderr
    print(next(sys.stdin), end="", file=replies, flush=True)
    for line in sys.stdin:
        if "resource" in globals():
            # A parent that is killed can stop nothing, and this would compute on
            _, hard_limit = resource.getrlimit(resource.RLIMIT_CPU)
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + 3 * TIME_LIMIT), hard_limit))
        try:
            reply: list[Any] = [_compare(*json.loads(line)), None]
        except (Exception, RecursionError) as error:
            reply = [False, f"{type(error).__name__}: {error}"[:300]]
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    _main()
