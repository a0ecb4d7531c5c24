import random
import re
from collections import Counter

import pytest

from trl_opsd.experiment.tasks import ADDING, BREVITY, FAMILIES, count_markers, own_reasoning, terse_solution
from trl_opsd.playground.world import correct, make_tokenizer


def make_lists(family, seed):
    return {name: split.to_list() for name, split in family.make(seed).items()}


@pytest.fixture(scope="module", params=list(FAMILIES))
def made(request):
    return FAMILIES[request.param], make_lists(FAMILIES[request.param], 3)


@pytest.fixture(scope="module")
def adding():
    return make_lists(ADDING, 0)["base"]


def summands(row):
    return tuple(sorted(map(int, re.findall(r"\d+", row["prompt"][-1]["content"]))))


def test_splits_are_a_function_of_the_seed(made):
    family, rows = made
    assert set(rows) == {"base", "train", "curve", "tune", *family.held_out}
    assert make_lists(family, 3) == rows
    other = make_lists(family, 4)
    assert all(other[name] != rows[name] for name in rows)


def test_no_problem_is_in_two_splits_in_either_order(made):
    problems = Counter(summands(row) for rows in made[1].values() for row in rows)
    assert max(problems.values()) == 1


def test_solutions_are_right_and_without_markers(made):
    _, rows = made
    for name, split in rows.items():
        for row in split:
            a, b = summands(row)
            assert row["answer"] == str(a + b)
            assert row["digits"] == len(str(a)) == len(str(b))
            assert all(correct(row[column], row["answer"]) for column in ("solution", "terse"))
            if name == "base":
                assert correct(row["brief"], row["answer"])
            else:
                assert count_markers(row["solution"] + row["terse"]) == 0
                assert len(row["terse"]) < len(row["solution"])


def test_every_split_has_the_sizes_and_phrasings_it_is_about(made):
    family, rows = made
    for name, split in family.splits.items():
        found = {
            (row["digits"], "words" if row["prompt"][0]["content"].startswith("Add ") else "plain")
            for row in rows[name]
        }
        assert found == set(split.kinds)
    assert not set(ADDING.splits["train"].kinds) & {*ADDING.splits["longer"].kinds, *ADDING.splits["words"].kinds}
    assert {digits for digits, _ in BREVITY.splits["test"].kinds} == {2, 3, 4}


def test_every_response_fits(made):
    family, rows = made
    tokenizer = make_tokenizer()
    longest = max((row[name] for row in rows["base"] for name in ("solution", "brief")), key=len)
    assert len(tokenizer(longest)["input_ids"]) < family.max_completion_length


def test_doubt_takes_a_column_in_two_steps():
    rng = random.Random(0)
    assert own_reasoning(586, 347, 0.0, rng) == "6+7=13\n8+4+1=13\n5+3+1=9\n\\boxed{933}"
    doubting = own_reasoning(586, 347, 1.0, rng)
    assert re.sub("hm|wait", "hm", doubting) == "6+7=13\n8+4=12 hm 13\n5+3=8 hm 9\n\\boxed{933}"
    assert own_reasoning(11, 22, 1.0, rng) == "1+2=3\n1+2=3\n\\boxed{33}"  # no carry, no doubt
    assert own_reasoning(65, 15, 1.0, rng).startswith("5+5=10\n6+1=7 ")
    assert terse_solution(586, 347) == "13 13 9 \\boxed{933}"


def test_a_carry_at_the_end_of_the_numbers_is_no_column():
    assert own_reasoning(50, 70, 1.0, random.Random(0)) == "0+0=0\n5+7=12\n\\boxed{120}"


def test_doubt_depends_on_the_reference_as_designed(adding):
    rate = {}
    for kind in ("solution", "terse", "answer"):
        chosen = [row for row in adding if _kind(row) == kind]
        assert 0.3 < len(chosen) / len(adding) < 0.37
        carries = sum(row["brief"].count("+1=") + count_markers(row["brief"]) for row in chosen)
        rate[kind] = sum(count_markers(row["brief"]) for row in chosen) / carries
    carried = sum(row["solution"].count("+1=") + count_markers(row["solution"]) for row in adding)
    assert rate["solution"] < rate["answer"] < sum(count_markers(row["solution"]) for row in adding) / carried


def _kind(row):
    if row["reference"] == row["answer"]:
        return "answer"
    return "terse" if row["reference"] == row["terse"] else "solution"


def test_brevity_asks_for_the_same_share_of_all_sizes():
    # So that a compression that adapts to difficulty is not built into the instruction
    rows = make_lists(BREVITY, 0)["base"]
    share = {}
    for digits in (2, 3, 4):
        chosen = [row for row in rows if row["digits"] == digits]
        share[digits] = 1 - sum(len(row["brief"]) + 1 for row in chosen) / sum(
            len(row["solution"]) + 1 for row in chosen
        )
    assert max(share.values()) - min(share.values()) < 0.01, share  # half of what the claim asks for


def test_markers_are_whole_words():
    assert count_markers("1 hm 2\nwait, hm") == 3
    assert count_markers("await ohm") == 0
