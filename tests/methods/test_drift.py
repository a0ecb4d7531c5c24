import json
from dataclasses import replace

import pytest
import torch
from rollouts import make_rollouts
from three_tokens import make_batch

from trl_opsd.context import Rollouts
from trl_opsd.methods.drift import BestSuccess, ByDifficulty


ROW = {"prompt": [{"role": "user", "content": "2 + 3?"}]}
OTHER = {"prompt": [{"role": "user", "content": "2 + 4?"}]}


@pytest.fixture
def context():
    return BestSuccess(template="{prompt}|{attempt}")


def group(rewards, lengths=None, texts=None):
    return make_rollouts(rewards, texts, token_ids=[[1] * length for length in lengths or [1] * len(rewards)])


def read(context, rollouts, row=ROW):
    found = [context.teacher_messages(row, Rollouts(rollouts, index)) for index in range(len(rollouts))]
    return [None if messages is None else messages[-1]["content"].rpartition("|")[2] for messages in found]


def logged(context, rollouts, row=ROW):
    groups = [Rollouts(rollouts, index) for index in range(len(rollouts))]
    return context.rates([row] * len(groups), groups)


def test_wrong_ones_read_the_best_then_shortest_success(context):
    assert read(context, group((0.0, 1.0, 1.0, 0.0), (1, 3, 2, 1))) == ["y2", None, None, "y2"]
    assert read(context, group((0.0, 2.0, 1.0), (1, 3, 2))) == ["y1", None, None]
    assert read(context, group((None, 1.0, 0.0))) == [None, None, "y1"]
    assert context.teacher_messages(ROW, None) is None


def test_a_group_without_success_reads_one_of_an_earlier_batch(context):
    wrong = group((0.0, 0.0))
    assert read(context, wrong) == [None, None]
    assert logged(context, wrong) == {"buffer/read_rate": (0, 2)}
    context.remember([(ROW, group((1.0, 0.0), texts=["early", "no"])), (OTHER, wrong)])
    assert read(context, wrong) == ["early", "early"]
    assert read(context, wrong, OTHER) == [None, None]
    assert logged(context, wrong) == {"buffer/read_rate": (2, 2)}
    # One of the group comes first
    now = group((0.0, 1.0), texts=["no", "now"])
    assert read(context, now) == ["now", None]
    assert logged(context, now) == {"buffer/read_rate": (0, 1)}


def test_the_best_is_remembered(context):
    for rewards, length, text in (((1.0,), 5, "long"), ((1.0,), 3, "short"), ((1.0,), 4, "longer"), ((0.0,), 1, "no")):
        context.remember([(ROW, group(rewards, [length], [text]))])
    assert read(context, group((0.0,))) == ["short"]
    context.remember([(ROW, group((1.5,), [9], ["better"]))])
    assert read(context, group((0.0,))) == ["better"]


def test_a_full_buffer_forgets_what_succeeded_first():
    context = BestSuccess(buffer_size=1, template="{prompt}|{attempt}")
    context.remember([(ROW, group((1.0,))), (OTHER, group((1.0,)))])
    assert read(context, group((0.0,))) == [None]
    assert read(context, group((0.0,)), OTHER) == ["y0"]
    none = BestSuccess(buffer_size=0)
    none.remember([(ROW, group((1.0,)))])
    assert read(none, group((0.0,))) == [None]
    with pytest.raises(ValueError, match="`buffer_size` must not be negative, got -1"):
        BestSuccess(buffer_size=-1)


def test_resumed_buffer(context):
    context.remember([(ROW, group((1.0,), [3]))])
    resumed = BestSuccess(template="{prompt}|{attempt}")
    resumed.load_state_dict(json.loads(json.dumps(context.state_dict())))
    resumed.remember([(ROW, group((1.0,), [4], ["longer"]))])
    assert read(resumed, group((0.0,))) == ["y0"]


def shaped(part, rates, correct=True, keys=None):
    keys = range(len(rates)) if keys is None else keys
    given = {"success_rate": torch.tensor(rates), "prompt_keys": torch.tensor(keys), "correct": correct}
    batch = make_batch(torch.ones(len(rates), 2).bool(), group_size=1, advantages=2.0, **given)
    return part(batch, None).flatten().tolist()


def test_factors_of_right_ones():
    assert shaped(ByDifficulty(), [0.0, 0.19, 0.2, 0.5, 0.8, 0.81, 1.0]) == [0.0, 0.0, 2.0, 2.0, 2.0, 1.0, 1.0]


def test_wrong_ones_are_not_reinforced():
    assert shaped(ByDifficulty(), [0.5, 0.9, 0.5], correct=torch.tensor([False, False, True])) == [0.0, 0.0, 2.0]


def test_the_rate_is_a_moving_average_that_is_saved():
    part = ByDifficulty(share=0.5)
    assert shaped(part, [0.1]) == [0.0]
    resumed = ByDifficulty(share=0.5)
    resumed.load_state_dict(json.loads(json.dumps(part.state_dict())))
    for one in (part, resumed):
        assert shaped(one, [0.2]) == [0.0]  # on average 0.15
        assert shaped(one, [0.35]) == [2.0]  # 0.25
    assert shaped(part, [0.1], keys=[7]) == [0.0]


def test_evaluation_neither_changes_the_average_nor_lacks_one():
    part = ByDifficulty()
    batch = make_batch(torch.ones(1, 2).bool(), success_rate=0.1, advantages=2.0)
    assert part(replace(batch, is_training=False), None).tolist() == [[0.0]]
    assert part.state_dict() == {"rates": {}}


def test_thresholds_out_of_order():
    with pytest.raises(ValueError, match="`hard` and `easy` must be in"):
        ByDifficulty(hard=0.9, easy=0.5)
