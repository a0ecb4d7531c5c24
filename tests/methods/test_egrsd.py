import math
from dataclasses import replace

import pytest
import torch
from three_tokens import P_S, advantages_of, make_batch, make_scores

from trl_opsd.methods.egrsd import EntropyGated
from trl_opsd.methods.rlsd import TeacherWeighted
from trl_opsd.signal import TokenScores


ENTROPY = (0.1, 0.9, 0.3, 1.2, 0.05)
MASK = torch.ones(1, 3, dtype=torch.bool)


def of_entropies(part, *entropies, rows=None, **given):
    """Weights of rollouts in which student and teacher agree, and whose advantage is a half."""
    width = max(map(len, entropies))
    entropy = torch.zeros(len(entropies), width)
    mask = torch.zeros(len(entropies), width, dtype=torch.bool)
    for row, values in enumerate(entropies):
        entropy[row, : len(values)], mask[row, : len(values)] = torch.tensor(values), True
    nothing = torch.zeros_like(entropy)
    scores = TokenScores(mask, nothing, nothing, nothing, entropy, nothing)
    return 2 * part(replace(make_batch(mask), **given), scores)


@pytest.mark.parametrize(("correct", "weight"), [(True, (0.8, 1.2, 1.2)), (False, (1.2, 0.8, 0.8))])
def test_exact_values(correct, weight):
    """The largest entropy is the only one, so that the gate is 0.7 everywhere; a warm-up's advantage is r − ½."""
    advantage = 1 + 0.5 * (1 - 3 / 10) - 0.5 if correct else -0.5
    found = advantages_of(EntropyGated(), 7.0, make_scores(), correct)
    assert found.tolist() == [pytest.approx([0.7 * advantage * value for value in weight], rel=1e-6)]


@pytest.mark.parametrize(
    ("lookahead", "expected"),
    [(0, (0.975, 0.775, 0.925, 0.7, 0.9875)), (2, (0.975, 0.925, 0.9875, 0.9875, 0.9875))],
)
def test_gate_of_a_rollout(lookahead, expected):
    found = of_entropies(EntropyGated(length_bonus=0.0, lookahead=lookahead), ENTROPY)
    assert found.tolist() == [pytest.approx(expected, abs=1e-6)]


def test_denominator_of_algorithm_1():
    """The largest entropy is 3, and 2 of the least of two in a row."""
    entropies = (1.0, 3.0, 1.0, 1.5, 2.0)
    part = EntropyGated(length_bonus=0.0, lookahead=1)
    least = torch.tensor([1.0, 1.0, 1.0, 1.5, 2.0])
    assert of_entropies(part, entropies)[0].tolist() == pytest.approx((1 - 0.3 * least / 3.0).tolist())
    replaced = replace(part, largest_of="replaced")
    assert of_entropies(replaced, entropies)[0].tolist() == pytest.approx((1 - 0.3 * least / 2.0).tolist())
    with pytest.raises(ValueError, match=r"`largest_of` must be one of \['raw', 'replaced'\], got 'all'"):
        EntropyGated(largest_of="all")


def test_lookahead_ends_with_the_rollout_and_never_lowers_a_weight():
    part = EntropyGated(length_bonus=0.0, lookahead=2)
    longer = (2.0, 0.1, 0.2, 0.3, 2.0, 2.0, 2.0)
    found = of_entropies(part, ENTROPY[:3], longer)
    assert found[0, :3].tolist() == pytest.approx([1 - 0.3 * least / 2.0 for least in (0.1, 0.3, 0.3)])
    plain = of_entropies(replace(part, lookahead=0), ENTROPY[:3], longer)
    assert (found >= plain).all()


def test_entropies_below_one_nat_are_divided_by_one():
    found = of_entropies(EntropyGated(length_bonus=0.0), (0.5, 0.25))
    assert found.tolist() == [pytest.approx([0.85, 0.925])]


def test_largest_entropy_is_that_of_all_processes():
    """So that it does not matter which process has a rollout."""
    part = EntropyGated(length_bonus=0.0)
    together = of_entropies(part, (0.1, 0.4), (2.0, 0.3))
    elsewhere = {"gather": lambda own: torch.cat([own, torch.full_like(own, 2.0)]), "is_training": False}
    assert of_entropies(part, (0.1, 0.4), **elsewhere)[0].equal(together[0])


def test_floor():
    found = of_entropies(EntropyGated(length_bonus=0.0, gate=1.0), (2.0, 1.0))
    assert found.tolist() == [pytest.approx([0.1, 0.5])]


def test_without_the_gate_it_weights_as_rlsd_does():
    for correct in (True, False):
        found = advantages_of(EntropyGated(gate=0.0), 0.0, make_scores(), correct)
        advantage = 0.85 if correct else -0.5
        assert found.equal(advantages_of(TeacherWeighted(mix=1.0), advantage, make_scores()))


def test_teacher_that_is_the_student_leaves_the_gate():
    """Of an entropy below one nat."""
    entropy = -sum(p * math.log(p) for p in P_S)
    found = advantages_of(EntropyGated(), 0.0, make_scores(p_t=P_S), correct=False)
    assert found.tolist() == [pytest.approx([-0.5 * (1 - 0.3 * entropy)] * 3)]


def test_without_either_it_asks_for_nothing():
    off = EntropyGated(clip=0.0, gate=0.0)
    assert not off.needs_scores
    assert off(make_batch(MASK), None).tolist() == [[pytest.approx(0.85)]]


def test_what_the_teacher_has_not_read_keeps_its_advantage():
    found = advantages_of(EntropyGated(), 0.0, make_scores(known=(True, False, True)))
    assert found[0, 1].item() == pytest.approx(0.85)


# The advantage of a rollout


def whitened(part, correct, lengths, **given):
    mask = torch.arange(10) < torch.tensor(lengths)[:, None]
    return part(make_batch(mask, correct=correct, **given), None)[:, 0]


def make_part(**settings):
    return EntropyGated(clip=0.0, gate=0.0, **{"warmup_steps": 2, **settings})


def test_short_completions_earn_more_and_wrong_ones_nothing():
    found = whitened(make_part(), [True, True, False], [10, 4, 4])
    assert found.tolist() == pytest.approx([0.5, 0.8, -0.5])


def test_after_the_warmup_it_is_whitened_by_what_was_before():
    part, seen = make_part(), []
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        correct = torch.rand(4, generator=generator) < 0.5
        lengths = torch.randint(1, 11, (4,), generator=generator)
        rewards = correct * (1.5 - 0.05 * lengths)
        found = whitened(part, correct, lengths.tolist())
        if step < 2:
            expected = rewards - 0.5
        else:
            past = torch.cat(seen).double()
            expected = (rewards - past.mean()) / past.std(correction=0)
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
        seen.append(rewards)


def test_statistics_are_those_of_all_processes():
    parts = [make_part(warmup_steps=0) for _ in range(3)]
    rewards = torch.tensor([[1.5 - 0.05 * 3], [0.0], [1.5 - 0.05 * 7], [0.0]])
    for part, rows in zip(parts, (slice(0, 2), slice(2, 4), slice(0, 4)), strict=True):
        correct, lengths = [True, False, True, False][rows], [3, 5, 7, 5][rows]
        batch = replace(
            make_batch(torch.arange(10) < torch.tensor(lengths)[:, None], correct=correct), gather=lambda own: rewards
        )
        part(batch, None)
    assert parts[0].state_dict() == parts[1].state_dict() == parts[2].state_dict()
    assert parts[0].state_dict()["count"] == 4


def test_evaluation_is_not_remembered():
    part = make_part()
    whitened(part, [True, False], [3, 4])
    before = part.state_dict()
    whitened(part, [True, False], [3, 4], is_training=False)
    assert part.state_dict() == before
    assert before["num_batches"] == 1


def test_what_nothing_was_said_about_counts_in_nothing():
    part = make_part()
    found = whitened(part, [True, False, False], [5, 5, 5], rewards=torch.tensor([1.0, torch.nan, 0.0]))
    assert found.tolist() == pytest.approx([0.75, 0.0, -0.5])
    assert part.state_dict()["count"] == 2
    whitened(part, False, [5], rewards=torch.tensor(torch.nan))
    assert part.state_dict()["count"] == 2


def test_equal_rewards_are_not_divided_by_nothing():
    part = make_part(warmup_steps=1)
    whitened(part, [False, False], [3, 4])
    assert whitened(part, [True, False], [10, 4]).tolist() == pytest.approx([1.0, 0.0])
    silent = make_part(warmup_steps=0)
    assert whitened(silent, [True, False], [10, 4]).tolist() == pytest.approx([1.0, 0.0])


def test_memory_goes_on():
    part = make_part(warmup_steps=1)
    whitened(part, [True, False], [3, 4])
    resumed = make_part(warmup_steps=1)
    resumed.load_state_dict(part.state_dict())
    given = [True, True, False], [2, 9, 9]
    assert whitened(resumed, *given).equal(whitened(part, *given))
    assert resumed.state_dict() == part.state_dict()
    assert not whitened(make_part(warmup_steps=1), *given).equal(whitened(part, *given))


def test_a_limit_is_needed():
    with pytest.raises(ValueError, match="`max_completion_length`, which is `None`"):
        whitened(make_part(), [True], [3], max_length=None)


def test_it_logs_what_it_does():
    logged = {}
    part = EntropyGated(length_bonus=0.0)
    part(make_batch(MASK, log=lambda name, total, count: logged.update({name: (total / count).item()})), make_scores())
    assert logged == {"entropy_gate": pytest.approx(0.7), "teacher_ratio_clipped_rate": pytest.approx(1.0)}
