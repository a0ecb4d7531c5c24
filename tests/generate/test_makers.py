"""What makers give, with stand-ins for what samples and grades."""

from dataclasses import replace

import pytest

from trl_opsd.generate import Attempt, Problems, make_maker


ROWS = [{"prompt": f"{number}?"} for number in range(6)]


class World:
    """Completions are numbered by how often their prompt was asked for; `right` says which are right."""

    def __init__(self, right=(), truncated=(), empty=(), ungraded=(), hinted=range(6)):
        self.right, self.truncated, self.empty, self.ungraded = right, truncated, empty, ungraded
        self.asked, self.sampled = {}, []
        self.problems = Problems(
            rows=ROWS,
            prompt_ids=[[row] for row in range(6)],
            hinted_prompt_ids=[[row, 100] if row in hinted else None for row in range(6)],
            sample=self.sample,
            grade=self.grade,
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
        ("fractions.Fraction", None, "is no maker: it needs the attributes `needs_rewards`"),
    ],
)
def test_bad_makers(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_maker(name, kwargs)
