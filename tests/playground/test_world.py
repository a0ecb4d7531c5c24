import random
import re
import string

import pytest
from transformers import AutoTokenizer

from trl_opsd.playground.world import (
    WORLDS,
    World,
    accuracy_reward,
    column_steps,
    correct,
    make_config,
    make_tokenizer,
    worked_solution,
)


SMALL = World(digits=2, base_rows=50, train_rows=40, test_rows=30, chatty=True)


def summands(row):
    return frozenset(re.findall(r"\d+", row["prompt"][-1]["content"]))


def test_splits_are_a_function_of_the_seed():
    first, again, other = SMALL.splits(3), SMALL.splits(3), SMALL.splits(4)
    for name in ("base", "train", "test"):
        assert first[name].to_list() == again[name].to_list()
        assert first[name].to_list() != other[name].to_list()


def test_no_problem_is_in_two_splits_in_either_order():
    # Two thirds of all problems of one digit, so that repetitions are certain to be drawn
    splits = World(digits=1, base_rows=10, train_rows=10, test_rows=10).splits(0)
    problems = [summands(row) for rows in splits.values() for row in rows]
    assert len(problems) == 30
    assert len(set(problems)) == 30


def test_more_rows_than_problems_are_refused():
    with pytest.raises(ValueError, match="45 different problems"):
        World(digits=1, base_rows=40, train_rows=5, test_rows=1).splits(0)


@pytest.mark.parametrize("name", list(WORLDS))
def test_rows_hold_one_user_turn_and_a_right_solution(name):
    splits = WORLDS[name].splits(0)
    assert set(splits["train"].column_names) == {"prompt", "solution", "answer"} == set(splits["test"].column_names)
    for row in splits["test"]:
        (message,) = row["prompt"]
        a, b = map(int, re.fullmatch(r"(\d+)\+(\d+)=\?", message["content"]).groups())
        assert message["role"] == "user"
        assert len(str(a)) == len(str(b)) == WORLDS[name].digits
        assert row["answer"] == str(a + b)
        assert correct(row["solution"], row["answer"])
    assert all(correct(row["brief"], row["answer"]) for row in splits["base"].select(range(100)))


def test_steps_carry():
    assert column_steps(586, 347) == [("6+7=13", 1), ("8+4+1=13", 1), ("5+3+1=9", 0)]
    assert worked_solution(586, 347, random.Random(0)) == "6+7=13\n8+4+1=13\n5+3+1=9\n\\boxed{933}"


def test_full_detail_restates_and_comments():
    assert worked_solution(58, 47, random.Random(0), detail=1.0) == (
        "We add 58 and 47.\n8+7=15, carry 1\n5+4+1=10, carry 1\n\\boxed{105}"
    )


def test_chatty_solutions_are_much_longer_than_brief_ones():
    rows = SMALL.splits(0)["base"]
    assert sum(map(len, rows["solution"])) > 1.8 * sum(map(len, rows["brief"]))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("1+2=3\n\\boxed{3}", True),
        ("\\boxed{ 3 }", True),
        ("\\boxed{4} no, \\boxed{3}", True),
        ("\\boxed{3} no, \\boxed{4}", False),
        ("\\boxed{13}", False),
        ("\\boxed{3", False),
        ("3", False),
        ("", False),
    ],
)
def test_the_last_box_is_graded(completion, expected):
    assert correct(completion, "3") is expected


def test_reward_takes_what_the_trainer_passes():
    completions = [[{"role": "assistant", "content": f"\\boxed{{{number}}}"}] for number in (3, 4)]
    assert accuracy_reward(completions=completions, answer=["3", "3"], prompts=[], completion_ids=[]) == [1.0, 0.0]


@pytest.fixture(params=["made", "loaded"])
def tokenizer(request, tmp_path):
    tokenizer = make_tokenizer()
    if request.param == "made":
        return tokenizer
    tokenizer.save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_every_printable_character_survives_a_round_trip(tokenizer):
    text = "".join(character for character in string.printable if character == "\n" or character >= " ")
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]


def test_padding_is_not_the_end_of_a_turn(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    config = make_config(tokenizer)
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_chat_template_renders_every_role_in_one_token(tokenizer):
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+2=?"}]
    text = "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+2=?<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    prompt = text + "<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == prompt
    assert len(ids) == len("Add.1+2=?") + 2 * 5 + 3  # per turn: two markers, the role, two line breaks
    answer = [*messages, {"role": "assistant", "content": "3"}]
    assert tokenizer.apply_chat_template(answer, tokenize=False).startswith(prompt)
