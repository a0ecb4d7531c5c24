r"""
The embedded tasks: addition, built so that published claims can come out either way.

`ADDING` is for methods that raise accuracy. The model's own reasoning doubts where a carry comes in, takes that column
in two steps and marks it (`8+4=12 hm 13`), while reference solutions take it in one (`8+4+1=13`) and never doubt. So
the markers stand for a way of computing that can be lost. `BREVITY` is for methods that shorten answers: the model
elaborates unless it is told to be brief, on problems of three sizes, and by about the same share on each. Told to be
brief, it still elaborates at times: what can be shortened is not gone once the instruction has been taken over.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from ..context import TemplateContext
from ..playground.world import column_steps, worked_solution


MARKERS = ("hm", "wait")
_MARKER_WORDS = re.compile(rf"\b(?:{'|'.join(MARKERS)})\b")

REFERENCE_TEMPLATE = "{prompt}\nReference:\n{%s}"
BRIEF_TEMPLATE = "Be brief: {prompt}"

# How often a carry raises doubt, by what the model reads besides the question. That a reference leaves less to doubt
# is built in; whether a student takes this over, and what it costs, is what is measured.
_DOUBT = {None: 0.8, "answer": 0.5, "terse": 0.1, "solution": 0.1}

_PHRASINGS: dict[str, Callable[[int, int], str]] = {
    "plain": lambda a, b: f"{a}+{b}=?",
    "words": lambda a, b: f"Add {a} and {b}.",
}


@dataclass(frozen=True)
class Split:
    """
    Problems of one split.

    Args:
        rows (`int`):
            Number of problems.
        kinds (`tuple[tuple[int, str], ...]`):
            Number of digits and phrasing (`"plain"` or `"words"`) of the problems, which take turns.
    """

    rows: int
    kinds: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Family:
    """
    A family of tasks.

    Args:
        name (`str`):
            `"adding"` or `"brevity"`.
        base_template (`str`):
            Template of the prompts that show a base model its privileged context.
        max_completion_length (`int`):
            Longest rollout and answer, in tokens.
        held_out (`tuple[str, ...]`):
            Splits that models are tested on at the end, the one in the domain of the training first.
        splits (`dict[str, Split]`):
            Problems by split, among them `"base"`, `"train"`, `"curve"`, on which a run is watched, and `"tune"`, by
            which learning rates are chosen.
    """

    name: str
    base_template: str
    max_completion_length: int
    held_out: tuple[str, ...]
    splits: dict[str, Split] = field(hash=False)

    @property
    def base_context(self) -> TemplateContext:
        """What writes the prompts that show a base model its privileged context."""
        return TemplateContext(self.base_template)

    def make(self, seed: int) -> dict[str, Dataset]:
        """
        Makes the rows of all splits. No two rows of any split ask for the same pair of summands, in either order.

        Args:
            seed (`int`):
                Seed of the problems.

        Returns:
            `dict[str, Dataset]`:
                Rows with the columns `"prompt"` (one user turn), `"solution"`, `"terse"`, `"answer"` and `"digits"`.
                In the base rows, `"solution"` is the model's own reasoning, `"reference"` what it may be shown, and
                `"brief"` its reasoning when it is.
        """
        rng = random.Random(f"{self.name} {seed}")
        seen: set[tuple[int, int]] = set()
        make_row = _BASE_ROWS[self.name]
        made = {}
        for name, split in self.splits.items():
            rows = []
            for index in range(split.rows):
                digits, phrasing = split.kinds[index % len(split.kinds)]
                a, b = _new_pair(digits, seen, rng)
                row = {
                    "prompt": [{"role": "user", "content": _PHRASINGS[phrasing](a, b)}],
                    "solution": worked_solution(a, b, rng),
                    "terse": terse_solution(a, b),
                    "answer": str(a + b),
                    "digits": digits,
                }
                rows.append(make_row(row, a, b, rng) if name == "base" else row)
            made[name] = Dataset.from_list(rows)
        return made


def _new_pair(digits: int, seen: set[tuple[int, int]], rng: random.Random) -> tuple[int, int]:
    while True:
        a, b = (rng.randint(10 ** (digits - 1), 10**digits - 1) for _ in range(2))
        pair = (min(a, b), max(a, b))
        if pair not in seen:
            seen.add(pair)
            return a, b


def own_reasoning(a: int, b: int, doubt: float, rng: random.Random) -> str:
    r"""
    The reasoning of `ADDING`'s base models: one line per column, then the boxed sum. A column that a carry comes into
    is doubted with probability `doubt`, which means: taken in two steps with a marker between them.
    """
    lines, carried = [], 0
    for step, carry in column_steps(a, b):
        if carried and rng.random() < doubt:
            total = int(step.split("=")[1])
            step = f"{step.split('+1=')[0]}={total - 1} {rng.choice(MARKERS)} {total}"
        lines.append(step)
        carried = carry
    return "\n".join([*lines, rf"\boxed{{{a + b}}}"])


def terse_solution(a: int, b: int) -> str:
    r"""The solution without its reasoning: the column sums, from the ones up, and the boxed sum."""
    sums = " ".join(step.split("=")[1] for step, _ in column_steps(a, b))
    return rf"{sums} \boxed{{{a + b}}}"


def count_markers(text: str) -> int:
    """Counts the markers of doubt in a response, as whole words."""
    return len(_MARKER_WORDS.findall(text))


def _adding_base_row(row: dict[str, Any], a: int, b: int, rng: random.Random) -> dict[str, Any]:
    kind = rng.choice(("solution", "terse", "answer"))
    return {
        **row,
        "reference": row[kind],
        "solution": own_reasoning(a, b, _DOUBT[None], rng),
        "brief": own_reasoning(a, b, _DOUBT[kind], rng),
    }


def _brevity_base_row(row: dict[str, Any], a: int, b: int, rng: random.Random) -> dict[str, Any]:
    return {
        **row,
        "solution": worked_solution(a, b, rng, detail=0.9),
        "brief": worked_solution(a, b, rng, detail=0.4),
    }


_BASE_ROWS = {"adding": _adding_base_row, "brevity": _brevity_base_row}


# The base has met what is out of domain for the training after it, as a pretrained model has: longer numbers, and the
# question in words.
_PLAIN = ((3, "plain"), (3, "plain"))

ADDING = Family(
    name="adding",
    base_template=REFERENCE_TEMPLATE % "reference",
    max_completion_length=72,
    held_out=("test", "longer", "words"),
    splits={
        "base": Split(12_000, (*_PLAIN, (4, "plain"), *_PLAIN, (4, "plain"), *_PLAIN, (4, "plain"), (3, "words"))),
        "train": Split(6_000, ((3, "plain"),)),
        "curve": Split(200, ((3, "plain"),)),
        "test": Split(300, ((3, "plain"),)),
        "longer": Split(200, ((4, "plain"),)),
        "words": Split(200, ((3, "words"),)),
        "tune": Split(300, ((3, "plain"),)),
    },
)

_SIZES = ((2, "plain"), (3, "plain"), (4, "plain"))

BREVITY = Family(
    name="brevity",
    base_template=BRIEF_TEMPLATE,
    max_completion_length=120,
    held_out=("test",),
    splits={
        "base": Split(6_000, _SIZES),
        "train": Split(2_400, _SIZES),
        "curve": Split(150, _SIZES),
        "test": Split(300, _SIZES),
        "tune": Split(300, _SIZES),
    },
)

FAMILIES: dict[str, Family] = {family.name: family for family in (ADDING, BREVITY)}
