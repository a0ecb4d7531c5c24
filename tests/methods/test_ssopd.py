from dataclasses import replace

import pytest
import torch
from rollouts import make_rollouts
from three_tokens import make_batch

from trl_opsd.context import Rollouts
from trl_opsd.methods.ssopd import ShortestForLongest, Undecided
from trl_opsd.signal.weighting import KeepFirst


ROW = {"prompt": [{"role": "user", "content": "2 + 3?"}]}


def read(rewards, lengths, context=None, texts=None):
    """What the teacher of each rollout reads, `None` without a context."""
    context = context or ShortestForLongest(template="{prompt}|{attempt}")
    group = make_rollouts(rewards, texts, token_ids=[[1] * length for length in lengths])
    found = [context.teacher_messages(ROW, Rollouts(group, index)) for index in range(len(group))]
    return [None if messages is None else messages[-1]["content"].rpartition("|")[2] for messages in found]


def test_the_shortest_right_one_teaches_the_longest_wrong_one_alone():
    assert read((1.0, 0.0, 1.0, 0.0, 0.0), (5, 2, 3, 7, 6)) == [None, None, None, "y2", None]
    # By its position, also where texts and lengths are the same
    assert read((0.0, 0.0, 1.0, 1.0), (4, 4, 3, 3), texts=["a", "a", "b", "c"]) == ["b", None, None, None]


@pytest.mark.parametrize("rewards", [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.0, None, 0.0), (None, None, None)])
def test_a_group_without_both_has_no_context(rewards):
    assert read(rewards, (1, 2, 3)) == [None] * 3


def test_an_attempt_without_text_is_not_shown():
    assert read((1.0, 1.0, 0.0), (1, 3, 2), texts=[" ", "b", "c"]) == [None, None, "b"]
    context = ShortestForLongest(template="{prompt}|{attempt}", strip_thinking=True)
    texts = ["<think>cut off", "<think>hm</think>b", "c"]
    assert read((1.0, 1.0, 0.0), (1, 3, 2), context, texts) == [None, None, "b"]


def test_before_there_are_rollouts_there_is_no_context():
    assert ShortestForLongest().teacher_messages(ROW, None) is None


@pytest.mark.parametrize(
    ("num_right", "expected"), [(0, 0.0), (1, 0.4375), (2, 0.75), (4, 1.0), (8, 0.0)], ids=lambda value: str(value)
)
def test_weight_of_a_group(num_right, expected):
    """In the paper, half of these: λ₀ is `divergence_coef`."""
    correct = torch.arange(8) < num_right
    batch = make_batch(torch.ones(8, 3).bool(), correct=correct, has_context=torch.arange(8) == 7)
    weights = Undecided()(batch, None)
    assert weights[:, 0].tolist() == [0.0] * 7 + [expected]


def test_the_mean_is_one_over_prompts():
    """Of two prompts, one of which has a pair, it counts half."""
    logged = {}
    batch = make_batch(
        torch.ones(8, 3).bool(),
        log=lambda name, numerator, denominator: logged.update({name: (numerator / denominator).item()}),
        correct=torch.tensor([True, False, True, False] + [True] * 4),
        has_context=torch.tensor([False] * 3 + [True] + [False] * 4),
        group_size=4,
    )
    assert Undecided()(batch, None).flatten().tolist() == [0.0] * 3 + [0.5] + [0.0] * 4
    assert logged == {"groups/pair_rate": 0.5, "groups/mean_weight": 1.0}
    # Also if no reward function applied to the other
    unknown = replace(batch, success_rate=torch.tensor([0.5] * 4 + [torch.nan] * 4).view(-1, 1))
    assert Undecided()(unknown, None).flatten().tolist() == [0.0] * 3 + [0.5] + [0.0] * 4


def test_prompts_are_those_of_all_processes():
    """Of two groups of four, this process has the first, whose fourth rollout has a pair."""
    batch = make_batch(
        torch.ones(4, 3).bool(),
        correct=torch.tensor([True, False, True, False]),
        has_context=torch.arange(4) == 3,
        gather=lambda own: torch.cat([own, torch.zeros_like(own)]),
    )
    assert Undecided()(batch, None).flatten().tolist() == [0.0] * 3 + [0.5]


def test_first_tokens_alone():
    kept = KeepFirst(2)(make_batch(torch.ones(1, 3).bool()), None)
    assert kept.tolist() == [True, True, False]
    with pytest.raises(ValueError, match="`num_tokens` must be at least 1, got 0"):
        KeepFirst(0)
