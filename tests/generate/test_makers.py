"""What makers give, with stand-ins for what samples and grades."""

from dataclasses import replace

import pytest

from trl_opsd.generate import Attempt, Problems, make_maker
from trl_opsd.sampling import Sampling


ROWS = [{"prompt": f"{number}?"} for number in range(6)]


class World:
    """Completions are numbered by how often their prompt was asked for; `right` says which are right."""

    def __init__(self, right=(), truncated=(), empty=(), ungraded=(), hinted=range(6), temperature=1.0):
        self.right, self.truncated, self.empty, self.ungraded = right, truncated, empty, ungraded
        self.asked, self.sampled = {}, []
        self.problems = Problems(
            rows=ROWS,
            prompt_ids=[[row] for row in range(6)],
            hinted_prompt_ids=[[row, 100] if row in hinted else None for row in range(6)],
            sample=self.sample,
            grade=self.grade,
            mix=self.mix,
            sampling=Sampling(temperature, 1.0, 0, 8),
            decode=None,
            writers={},
            has_second_model=False,
        )

    def sample(self, rows, prompt_ids, what):
        attempts = []
        for row, prompt in zip(rows, prompt_ids, strict=True):
            key = tuple(prompt)
            self.asked[key] = number = self.asked.get(key, -1) + 1
            name = f"{row}h" if len(prompt) == 2 else f"{row}.{number}"
            text = "" if name in self.empty else name
            attempts.append(Attempt(row, text, [1], seed=number, truncated=name in self.truncated))
        self.sampled.append((what, list(rows)))
        return attempts

    def mix(self, rows, prompt_ids, other_prompt_ids, share, what):
        assert other_prompt_ids == [[row, 100] for row in rows]
        attempts = self.sample(rows, prompt_ids, f"{what}, {share}")
        return [replace(attempt, sides=[True, False]) for attempt in attempts]

    def grade(self, attempts):
        return [
            attempt
            if attempt.completion in self.ungraded
            else replace(
                attempt, reward=float(attempt.completion in self.right), correct=attempt.completion in self.right
            )
            for attempt in attempts
        ]


def test_star_tries_again_what_is_wrong_and_keeps_what_is_right():
    world = World(right={"0.0", "1h", "5.0"}, truncated={"5.0"}, ungraded={"4.0"}, hinted={0, 1, 2, 4, 5})
    made = make_maker("star")(world.problems)

    assert world.sampled == [("first tries", [0, 1, 2, 3, 4, 5]), ("hinted retries", [1, 2])]
    assert [(record["completion"], record["source"]) for record in made.records] == [
        ("0.0", "first_try"),
        ("1h", "hinted_retry"),
    ]
    # The prompt that is learnt is the one without the hint
    assert [record["prompt"] for record in made.records] == ["0?", "1?"]
    assert made.records[1] == {
        "prompt": "1?",
        "completion": "1h",
        "source": "hinted_retry",
        "row": 1,
        "seed": 0,
        "truncated": False,
        "reward": 1.0,
        "correct": True,
    }
    assert made.dropped == {
        "wrong, also with the context": 1,
        "wrong": 1,
        "without a reward": 1,
        "truncated": 1,
    }


@pytest.mark.parametrize(
    ("keep", "kept", "dropped"),
    [
        ("all", 12, {}),
        ("finished", 10, {"truncated": 1, "empty": 1}),
        ("correct", 2, {"truncated": 1, "empty": 1, "wrong": 8}),
    ],
)
def test_rollouts(keep, kept, dropped):
    world = World(right={"0.0", "3.1", "4.0"}, truncated={"4.0"}, empty={"5.1"})
    made = make_maker("rollouts", {"num_samples": 2, "keep": keep})(world.problems)
    assert len(made.records) == kept
    assert made.dropped == dropped
    assert {record["source"] for record in made.records} == {"rollout"}
    if keep == "correct":
        assert [record["completion"] for record in made.records] == ["0.0", "3.1"]


def test_mixsd_tries_again_until_it_is_right():
    world = World(right={"0.0", "1.1", "5.2"}, truncated={"0.0", "3.2"}, hinted={0, 1, 3, 5})
    made = make_maker("mixsd", {"share": 0.3, "max_tries": 3})(world.problems)

    assert [rows for _, rows in world.sampled] == [[0, 1, 3, 5], [0, 1, 3, 5], [0, 3, 5]]
    assert [what for what, _ in world.sampled] == [f"mixed, try {number}, 0.3" for number in (1, 2, 3)]
    assert [(record["completion"], record["tries"]) for record in made.records] == [("1.1", 2), ("5.2", 3)]
    assert made.records[0] == {
        "prompt": "1?",
        "completion": "1.1",
        "source": "mixed",
        "row": 1,
        "seed": 1,
        "truncated": False,
        "reward": 1.0,
        "correct": True,
        "tries": 2,
        "sides": [True, False],
    }
    assert made.dropped == {
        "without a context": 2,
        "wrong in the last of 3 tries": 1,
        "truncated in the last of 3 tries": 1,
    }


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_greedy_tries_of_one_side_are_all_the_same(share):
    world = World(temperature=0.0)
    with pytest.raises(ValueError, match=r"all tries of a row are the same\. Set `max_tries: 1`"):
        make_maker("mixsd", {"share": share})(world.problems)
    assert not world.sampled
    make_maker("mixsd", {"share": share, "max_tries": 1})(world.problems)
    make_maker("mixsd", {"share": 0.5})(world.problems)


def test_pbsd_pairs_what_the_teacher_and_the_student_say():
    world = World(right={"0.0"}, truncated={"1h", "2.0"}, empty={"3h", "3.0", "4.0"}, hinted={0, 1, 2, 3, 4})
    made = make_maker("pbsd")(world.problems)

    assert world.sampled == [("the student's", [0, 1, 2, 3, 4]), ("the teacher's", [0, 1, 2, 3, 4])]
    assert made.records == [
        {
            "prompt": "0?",
            "chosen": "0h",
            "rejected": "0.0",
            "source": "teacher_over_student",
            "row": 0,
            "chosen_seed": 0,
            "chosen_truncated": False,
            "chosen_reward": 0.0,
            "chosen_correct": False,
            "rejected_seed": 0,
            "rejected_truncated": False,
            "rejected_reward": 1.0,
            "rejected_correct": True,
        }
    ]
    assert made.dropped == {
        "without a context": 1,
        "teacher's truncated": 1,
        "student's truncated": 1,
        "twice the same": 1,
        "student's empty": 1,
    }


def test_pbsd_keeps_all_that_differ():
    world = World(truncated={"1h", "2.0"}, empty={"3h", "3.0", "4.0"})
    made = make_maker("pbsd", {"num_samples": 2, "keep": "all"})(world.problems)
    assert len(made.records) == 12 - 1
    assert made.dropped == {"twice the same": 1}


def test_completions_without_a_reward_are_not_correct():
    world = World(ungraded={f"{row}.0" for row in range(6)})
    made = make_maker("rollouts", {"keep": "correct"})(world.problems)
    assert not made.records
    assert made.dropped == {"without a reward": 6}
    world.asked.clear()
    kept = make_maker("rollouts")(world.problems).records
    assert [(record["reward"], record["correct"]) for record in kept] == [(None, None)] * 6


def test_messages_without_content_are_empty():
    attempt = Attempt(0, [{"role": "assistant", "content": " "}], [1], 0, truncated=False)
    assert attempt.shortcoming(needs_correct=False) == "empty"


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("stat", None, "`maker='stat'` is none of .* Did you mean `star`"),
        ("star", {"num_samples": 2}, r"arguments \{'num_samples': 2\} do not fit `maker='star'`"),
        ("rollouts", {"num_samples": 0}, "`num_samples` of the rollouts maker must be at least 1, got 0"),
        ("rollouts", {"keep": "right"}, "`keep` of the rollouts maker must be one of all, finished, correct"),
        ("mixsd", {"share": 1.1}, r"`share` of the mixsd maker must be in \[0, 1\], got 1.1"),
        ("mixsd", {"max_tries": 0}, "`max_tries` of the mixsd maker must be at least 1, got 0"),
        ("pbsd", {"num_samples": 0}, "`num_samples` of the pbsd maker must be at least 1, got 0"),
        ("pbsd", {"keep": "correct"}, "`keep` of the pbsd maker must be one of all, finished, got 'correct'"),
        ("fractions.Fraction", None, "is no maker: it needs the attributes `needs_rewards`"),
    ],
)
def test_bad_makers(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_maker(name, kwargs)
