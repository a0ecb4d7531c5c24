"""What the scorer decides on the cases that math-verify publishes, and why where that is something else."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from trl_opsd.eval.scorer import score


CASES = [json.loads(line) for line in Path(__file__).with_name("math_verify_cases.jsonl").open("rb")]
DOCS = Path(__file__).parents[2] / "docs" / "scoring.md"


@pytest.mark.needs("math_verify")
@pytest.mark.parametrize("case", CASES, ids=range(1, len(CASES) + 1))
def test_verdicts(case):
    assert score(case["completion"], case["reference"]).correct is case["correct"]


def test_cases_are_different():
    assert len({(case["completion"], case["reference"], case["math_verify"]) for case in CASES}) == len(CASES)


def test_every_disagreement_has_a_reason_in_the_docs():
    for case in CASES:
        assert ("class" in case) == (case["correct"] is not case["math_verify"]), case
    section = DOCS.read_text(encoding="utf-8").partition("## Where math-verify decides otherwise")[2]
    classes = Counter(case["class"] for case in CASES if "class" in case)
    listed = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|", section.partition("\n## ")[0], re.MULTILINE)
    assert {name: int(number) for name, number in listed} == classes
    total, agree, other = map(int, re.findall(r"\b\d{2,}\b", section.partition("\n\n|")[0]))
    assert (total, agree, other) == (len(CASES), len(CASES) - classes.total(), classes.total())
