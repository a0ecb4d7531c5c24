"""Completions and the reward functions of a training run."""

import math

import pytest

from trl_opsd.generate import Attempt
from trl_opsd.generate.rewards import Rewards


ROWS = [{"prompt": f"{number}?", "answer": str(number)} for number in range(5)]
ATTEMPTS = [Attempt(row, str(min(row, 3)), [row], 0, False) for row in range(5)]


def right(prompts, completions, completion_ids, answer, log_metric, log_extra, trainer_state, **kwargs):
    assert len(prompts) == len(completions) == len(completion_ids) == len(answer) <= 2
    log_metric("right", 1.0)
    log_extra("answer", answer)
    assert trainer_state.global_step == 0
    return [float(text == its) for text, its in zip(completions, answer, strict=True)]


async def only_the_first(completion_ids, **kwargs):
    return [0.5 if ids == [0] else None for ids in completion_ids]


def graded(*functions, threshold=1.0, attempts=ATTEMPTS):
    return [(one.reward, one.correct) for one in Rewards(functions, ROWS, threshold, batch_size=2)(attempts)]


def test_rewards_are_summed_where_they_apply():
    assert graded(right) == [(1.0, True)] * 4 + [(0.0, False)]
    assert graded(right, only_the_first)[0] == (1.5, True)
    assert graded(only_the_first, threshold=0.5) == [(0.5, True)] + [(None, None)] * 4
    assert graded(lambda completions, **kwargs: [math.nan] * len(completions)) == [(None, None)] * 5
    assert graded() == [(None, None)] * 5


def test_each_completion_is_graded_with_its_own_row():
    assert graded(right, attempts=ATTEMPTS[3:]) == [(1.0, True), (0.0, False)]


def needs_target(completions, target, **kwargs):
    return [0.0 for _ in completions]


def test_a_column_that_is_missing_is_found_before_anything_is_sampled():
    with pytest.raises(ValueError, match=r"`needs_target` .* `prompt`, `answer`: missing .* 'target'\. Rename a col"):
        graded(needs_target)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, **kwargs: [1.0], "gave 1 rewards for 2 completions"),
        (lambda completions, **kwargs: [math.inf] * len(completions), "gave an infinite reward"),
    ],
)
def test_bad_rewards(function, message):
    with pytest.raises(ValueError, match=f"The reward function `<lambda>` {message}"):
        graded(function)
