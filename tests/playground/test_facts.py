"""The made-up world: what its tests rest on."""

import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest

from trl_opsd.playground.facts import (
    CHAINS,
    FACTS_PER_SIZE,
    MAX_SIZE,
    RELATIONS,
    is_right,
    make_world,
    names_reward,
)


SIZES = (1, 4, MAX_SIZE)
PRINTED = "from trl_opsd.playground.facts import make_world; print(make_world(5, 3).rows())"


def question(row):
    return row["prompt"][-1]["content"]


def names(world):
    return {fact.name for fact in world.facts}


def is_in(name, text):
    return re.search(rf"(?<!\w){re.escape(name.casefold())}(?!\w)", text.casefold()) is not None


def test_a_world_depends_on_its_seed_alone():
    printed = {
        subprocess.run(
            [sys.executable, "-c", PRINTED], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert printed == {str(make_world(5, 3).rows())}
    assert make_world(5, 4) != make_world(5, 3)
    assert names(make_world(5, 4)) != names(make_world(5, 3))


@pytest.mark.parametrize("size", SIZES)
def test_all_facts_are_asked_about(size):
    world = make_world(size)
    rows = world.rows()
    assert len(world.facts) == FACTS_PER_SIZE * size
    assert {name: len(its) for name, its in rows.items()} == {
        "trained": 4 * FACTS_PER_SIZE * size,
        "new": 2 * FACTS_PER_SIZE * size,
        "two": len(CHAINS) * size,
    }
    for split in ("trained", "new"):
        assert {row["fact"] for row in rows[split]} == {fact.statement for fact in world.facts}


@pytest.mark.parametrize("size", SIZES)
def test_no_question_of_the_test_is_trained_on(size):
    rows = make_world(size).rows()
    asked = [question(row) for row in chain.from_iterable(rows.values())]
    assert len(set(asked)) == len(asked)
    # Nor in another wording of the same words
    bare = {name: {re.sub(r"\W+", " ", question(row)).casefold() for row in its} for name, its in rows.items()}
    assert not bare["trained"] & (bare["new"] | bare["two"])


@pytest.mark.parametrize("size", SIZES)
def test_no_question_gives_its_answer_away(size):
    for row in chain.from_iterable(make_world(size).rows().values()):
        assert not any(is_in(name, question(row)) for name in (*row["aliases"], *row["others"]))
        # Nor does a name: nobody called Baker is a baker
        assert not any(alias.casefold() in row["name"].casefold() for alias in row["aliases"])


@pytest.mark.parametrize("size", SIZES)
def test_what_is_read_says_the_answer(size):
    for row in chain.from_iterable(make_world(size).rows().values()):
        assert is_right(row["solution"], row)
        for column in ("fact", "about", "sheet"):
            assert row["solution"] in row[column].splitlines()
        assert set(row["fact"].splitlines()) <= set(row["about"].splitlines()) <= set(row["sheet"].splitlines())


def test_a_question_of_two_facts_takes_both():
    world = make_world(6)
    for row in world.rows()["two"]:
        first, second = row["fact"].splitlines()
        assert row["name"] in first
        assert row["name"] not in second
        [between] = [fact for fact in world.facts if fact.statement == first]
        assert between.aliases[0] in second
        assert not is_in(between.aliases[0], question(row))


def test_names_are_no_words():
    made = {name.casefold() for seed in range(20) for name in names(make_world(MAX_SIZE, seed))}
    assert not made & set(chain.from_iterable(map(words_of, word_lists())))
    assert all(len(name) >= 6 for name in made)
    # Nor the name of two things
    for seed in range(20):
        assert len(names(make_world(MAX_SIZE, seed))) == 3 * MAX_SIZE


def word_lists():
    """Whatever text is at hand: the system's words, this project's but for the page of names, and reasoning-gym's."""
    found = [path for path in (Path("/usr/share/dict/words"),) if path.is_file()]
    found += set(Path(__file__).parents[2].glob("docs/*.md")) - {Path(__file__).parents[2] / "docs" / "real_model.md"}
    spec = find_spec("reasoning_gym")
    if spec is not None:
        found += (Path(spec.origin).parent / "data").rglob("*.txt")
    assert found
    return found


def words_of(path):
    return re.findall(r"[a-z]+", path.read_text(encoding="utf-8", errors="ignore").casefold())


def test_values_of_a_relation_do_not_contain_one_another():
    for relation in RELATIONS.values():
        if not isinstance(relation.values, str):
            assert len(relation.values) == MAX_SIZE
            for one in relation.values:
                for other in relation.values:
                    assert one is other or not any(is_in(a, b) for a in one for b in other)


@pytest.mark.parametrize("size", [0, MAX_SIZE + 1])
def test_a_world_has_a_size(size):
    with pytest.raises(ValueError, match=rf"must be from 1 to {MAX_SIZE}, got {size}"):
        make_world(size)


def test_the_reward_is_the_scorers_verdict():
    row = {"aliases": ["beekeeper", "keeps bees"], "others": ["baker"]}
    texts = ["She is a Beekeeper.", "He keeps bees!", "A baker.", "A beekeeper or a baker.", "Beekeepers.", ""]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = names_reward(
        completions=completions, aliases=[row["aliases"]] * 6, others=[row["others"]] * 6, prompts=None
    )
    assert rewards == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert [is_right(text, row) for text in texts] == [reward == 1.0 for reward in rewards]
