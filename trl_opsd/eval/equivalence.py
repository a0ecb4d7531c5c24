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
import resource
import subprocess
import sys
import threading
import time
from functools import lru_cache
from importlib.util import find_spec
from operator import itemgetter
from typing import Any


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
_BASE = re.compile(r"\d_\{?(\d+)\}?$")
_ASSIGNMENT = re.compile(rf"(^|,|;|\b(?:or|and)\b\}}?)(\s*)({_NAME}|\([A-Za-z, ]+\))\s*(?:=|\\approx|\\in\b)\s*(?=\S)")


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
    text = re.sub(r"\\(?:left|right|displaystyle|bigl|bigr|Bigl|Bigr)(?![A-Za-z])", "", text)
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


def _mixed_number(match: re.Match[str]) -> str:
    sign, whole, *parts = match.groups()
    numerator, denominator = (part for part in parts if part is not None)
    return rf"{sign}\frac{{{int(whole) * int(denominator) + int(numerator)}}}{{{denominator}}}"


def _without_names(answer: str, reference: str) -> str:
    if "=" in reference or re.search(r"\b(?:no|not|never|cannot)\b", answer):
        return answer
    named = list(_ASSIGNMENT.finditer(answer))
    if named and named[0].start() == 0:
        # y = 2, x = 1 answers (1, 2)
        ends = [match.start() for match in named[1:]] + [len(answer)]
        values = [(match[3], answer[match.end() : end]) for match, end in zip(named, ends, strict=True)]
        answer = ", ".join(value.strip() for _, value in sorted(values, key=itemgetter(0)))
    # 3 + 4 = 7 answers 7, but an equation in x is no value.
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
    return _checker.ask(normalise(reference), None if answer is None else normalise(answer))


def _main() -> None:
    import logging

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Eq, FiniteSet, Interval, Tuple

    logging.disable(logging.CRITICAL)
    # math-verify strips units from variables too: to it, 5t and 5 are the same.
    config = LatexExtractionConfig(
        boxed_match_priority=-1,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
        ),
    )

    def read(text: str) -> Any:
        parsed = parse(f"$${text}$$", [config], fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)
        if not parsed:
            raise ValueError(f"math-verify cannot parse {text!r}")
        return parsed[0]

    def is_same(reference: str, answer: str) -> bool:
        answer = _without_names(answer, reference)
        gold, given = read(reference), read(answer)
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
        if not verify(gold, given, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True):
            return False
        if isinstance(gold, FiniteSet) or isinstance(given, FiniteSet):
            return True
        # It compares the first six decimals, which are zeros for 1.6e-19 and 1.7e-19.
        try:
            first, second = float(gold.doit()), float(given.doit())
        except (AttributeError, TypeError):
            return True
        return first == second or abs(first - second) <= _CLOSE * max(abs(first), abs(second))

    def compare(reference: str, answer: str | None) -> bool:
        if answer is None:
            return read(reference) is not None
        if is_same(reference, answer):
            return True
        return (r"\%" in reference) != (r"\%" in answer) and is_same(
            *(t.replace(r"\%", "") for t in (reference, answer))
        )

    # What a library prints must not get between the replies.
    replies, sys.stdout = sys.stdout, sys.stderr
    print(next(sys.stdin), end="", file=replies, flush=True)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_CPU)
    for line in sys.stdin:
        # A parent that is killed can stop nothing, and this would compute on
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + 3 * TIME_LIMIT), hard_limit))
        try:
            reply: list[Any] = [compare(*json.loads(line)), None]
        except (Exception, RecursionError) as error:
            reply = [False, f"{type(error).__name__}: {error}"[:300]]
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    _main()
