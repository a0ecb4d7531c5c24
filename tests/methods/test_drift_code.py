import json
from dataclasses import replace

import pytest
import torch
from rollouts import make_rollouts
from three_tokens import make_batch, make_scores

from trl_opsd.context import Rollouts
from trl_opsd.methods.drift_code import AnySuccess, Corrected, Reinforced


ROW = {"prompt": [{"role": "user", "content": "2 + 3?"}]}
OTHER = {"prompt": [{"role": "user", "content": "2 + 4?"}]}


@pytest.fixture
def context():
    return AnySuccess(template="{prompt}|{attempt}")


def read(context, rollouts, row=ROW):
    found = [context.teacher_messages(row, Rollouts(rollouts, index)) for index in range(len(rollouts))]
    return [None if messages is None else messages[-1]["content"].rpartition("|")[2] for messages in found]


def test_each_reads_another_success(context):
    assert read(context, make_rollouts([0.0, 1.0, 1.0])) == ["y1", "y2", "y1"]
    assert read(context, make_rollouts([0.0, 1.0])) == ["y1", None]
    assert read(context, make_rollouts([None, 1.0])) == ["y1", None]
    assert context.teacher_messages(ROW, None) is None


def test_or_the_best_and_newest_of_earlier_batches(context):
    for texts, rewards in ((["a", "b"], [1.0, 2.0]), (["c", "d"], [1.0, 0.0]), (["e", "f"], [1.0, 1.0])):
        context.remember([(ROW, make_rollouts(rewards, texts))])
    alone = make_rollouts([0.0, 0.0], ["x", "y"])
    assert read(context, alone) == ["b", "b"]
    assert read(context, make_rollouts([1.0, 0.0], ["b", "y"])) == ["e", "b"]  # not itself
    assert read(context, alone, OTHER) == [None, None]
    resumed = AnySuccess(template="{prompt}|{attempt}")
    resumed.load_state_dict(json.loads(json.dumps(context.state_dict())))
    for one in (context, resumed):
        assert [text for *_, text in one._successes[next(iter(one._successes))]] == ["b", "e", "f", "c"]
        one.remember([(ROW, make_rollouts([1.0], ["a"]))])
        assert read(one, make_rollouts([1.0], ["b"])) == ["a"]
    groups = [Rollouts(alone, index) for index in range(2)]
    assert context.rates([ROW, OTHER], groups) == {"buffer/read_rate": (1, 2)}


def test_a_full_buffer_forgets_the_oldest():
    context = AnySuccess(buffer_size=1, template="{prompt}|{attempt}")
    context.remember([(ROW, make_rollouts([1.0], ["old"]))])
    context.remember([(OTHER, make_rollouts([1.0], ["new"]))])
    assert read(context, make_rollouts([0.0])) == [None]
    assert read(context, make_rollouts([0.0]), OTHER) == ["new"]
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 4"):
        AnySuccess(buffer_size=0)


def weights(part, rewards, scores=None, **given):
    """Of a rollout of each prompt, with as many in its group as it has rewards."""
    right, tokens = torch.tensor(rewards), torch.ones(len(rewards), 3).bool()
    batch = make_batch(tokens, correct=right == 1, rewards=right, advantages=1.0, **given)
    return part(batch, scores)[:, 0].tolist()


# Of 4 right rollouts of 8, the estimate is .5; of none, .5·(1/10) + .5·.5 = .3
HALF, NONE = [1.0] * 4 + [0.0] * 4, [0.0] * 8


def test_exact_values():
    """At .5, h = e = .070505, before they are divided by .99503 + ..., and m = .858991."""
    half = weights(Corrected(), HALF)
    assert half[:4] == [0.0] * 4
    hard = 0.0758582 / (2 * 0.0758582 + 0.9241418**2)
    assert half[4:] == pytest.approx([1.35 * hard] * 4, rel=1e-5)
    # At .3, h is ½ before and e .0066929
    total = 0.5 + 0.5 * 0.9933071 + 0.0066929
    assert weights(Corrected(), NONE) == pytest.approx([(0.5 + 0.35 * 0.0066929) / total] * 8, rel=1e-5)
    reinforced = weights(Reinforced(bonus=0.0), HALF)
    assert reinforced == pytest.approx([1 - 2 * hard + 0.35 * hard] * 4 + [0.0] * 4, rel=1e-5)


def test_without_a_teacher_it_is_grpo():
    has_context = torch.tensor([True, False] * 4)
    shaped = weights(Reinforced(bonus=0.0), HALF, has_context=has_context)
    assert shaped[1::2] == [1.0] * 4
    assert shaped[4::2] == [0.0, 0.0]


def test_bonus_where_the_student_is_surer():
    """δ is −1.1, .5 and 1.1: only of the first token is the student surer, by more than the factor can say."""
    batch = make_batch(torch.ones(1, 3).bool(), advantages=1.0)
    plain, shaped = (Reinforced(bonus=bonus)(batch, make_scores()) for bonus in (0.0, 1.0))
    medium = Reinforced()._difficulty(batch)[1].item()
    assert (shaped / plain).tolist() == [pytest.approx([1 + medium, 1.0, 1.0])]
    small = Reinforced(margin=1.0)(batch, make_scores())
    assert (small / plain)[0, 0].item() == pytest.approx(1 + medium * (3 * 2.718281828**-1 - 1), rel=1e-5)


def test_counts_fade_and_are_saved():
    part = Reinforced(bonus=0.0)
    first = weights(part, HALF)
    resumed = Reinforced(bonus=0.0)
    resumed.load_state_dict(json.loads(json.dumps(part.state_dict())))
    keys = torch.full((8,), 7)
    for one in (part, resumed):
        weights(one, NONE, prompt_keys=keys)  # another prompt
        second = weights(one, HALF)
        # s = f = 4·.85² + 4: as many of both, of which there are more
        assert one.state_dict()["seen"]["0"] == [pytest.approx(6.89), pytest.approx(6.89), 3]
        assert second[0] == pytest.approx(first[0])
    assert part.state_dict() == resumed.state_dict()


def test_evaluation_is_not_remembered():
    part = Corrected()
    batch = make_batch(torch.ones(8, 3).bool(), correct=torch.tensor(HALF) == 1)
    part(replace(batch, is_training=False), None)
    assert part.state_dict() == {"num_batches": 0, "seen": {}}
