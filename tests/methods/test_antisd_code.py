import math
from dataclasses import replace

import pytest
import torch
from three_tokens import P_S, P_T, make_batch, make_scores

from trl_opsd.methods.antisd_code import StandardisedAway
from trl_opsd.signal import TokenScores


def scores_of(perplexities, deltas):
    """Rollouts of as many tokens as there are deltas, at each of which the teacher is as perplexed."""
    delta = torch.tensor(deltas)
    teacher = -torch.tensor(perplexities).log().view(-1, 1).expand_as(delta)
    nothing = torch.zeros_like(delta)
    return TokenScores(torch.ones_like(delta, dtype=torch.bool), teacher - delta, teacher, nothing, nothing, nothing)


def shaped(part, scores, **given):
    return part(make_batch(scores.known, **{"advantages": 0.0, **given}), scores)


def warmed(perplexities=(2.0,), deltas=((-1.0, 0.5, 1.0),), **settings):
    """After a warm-up of one batch."""
    part = StandardisedAway(warmup_steps=1, **settings)
    shaped(part, scores_of(perplexities, deltas))
    return part


@pytest.mark.parametrize(
    ("ratio", "expected"), [(1 / 0.93, 0.01451), (1.0, 0.0), (1.07 / 0.93, 0.02805), (3.0, 0.21972), (5.0, 0.21972)]
)
def test_strength(ratio, expected):
    """At a perplexity that is so many times 0.93 of the warm-up's median."""
    part = warmed(most_perplexity=math.inf)
    median, _ = part._references()
    found = part._strengths(torch.tensor([[0.93 * median * ratio]]), median)
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert part._strengths(torch.tensor([[0.1]]), median).item() == 0.0


def test_pushes_are_standardised_within_a_rollout():
    scores = make_scores()
    found = StandardisedAway._pushes(scores.delta, scores.known, deviation=10.0)
    phi = torch.tensor([-0.202733, 0.143841, 0.346574])
    expected = -(phi - phi.mean()) / phi.std(correction=0)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    assert found.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert found[0, 0] > 0  # what the teacher finds less likely


def test_what_is_far_off_counts_as_agreement():
    delta = torch.tensor([[-1.0, 0.5, 9.0, 1.0]])
    found, expected = (
        StandardisedAway._pushes(its, torch.ones_like(its, dtype=torch.bool), deviation=1.0)
        for its in (delta, torch.tensor([[-1.0, 0.5, 0.0, 1.0]]))
    )
    assert found.equal(expected)


def test_what_the_teacher_has_not_read_takes_no_part():
    known = torch.tensor([[True, False, True, True]])
    delta = torch.tensor([[-1.0, 7.0, 0.5, 1.0]])
    found = StandardisedAway._pushes(delta.where(known, 0.0), known, deviation=10.0)
    alone = StandardisedAway._pushes(delta[known].view(1, 3), known[known].view(1, 3), deviation=10.0)
    assert found[known].tolist() == pytest.approx(alone[0].tolist())
    unread = shaped(warmed(), make_scores(known=(False, False, False)), advantages=0.7)
    assert unread.expand(1, 3).equal(torch.full((1, 3), 0.7))


def test_advantages_of_a_rollout():
    part = warmed()
    scores = scores_of([2.5], [[-1.0, 0.5, 1.0]])
    found = shaped(part, scores, advantages=0.3)
    strength = 0.2 * math.log(2.5 / (0.93 * 2.0))
    pushes = StandardisedAway._pushes(scores.delta, scores.known, deviation=math.sqrt(2.25 / 3 - (0.5 / 3) ** 2))
    torch.testing.assert_close(found, 0.3 + strength * pushes, rtol=1e-5, atol=1e-6)


def test_a_perplexed_teacher_is_not_heard():
    part, scores = warmed(), scores_of([3.5], [[-1.0, 0.5, 1.0]])
    assert shaped(part, scores, advantages=0.3).expand(1, 3).equal(torch.full((1, 3), 0.3))
    assert not shaped(warmed(most_perplexity=4.0), scores, advantages=0.3).equal(torch.full((1, 3), 0.3))


def test_it_warms_up_as_grpo():
    part, scores = StandardisedAway(warmup_steps=2), scores_of([2.0], [[-1.0, 0.5, 1.0]])
    for _ in range(2):
        assert shaped(part, scores, advantages=0.3).expand(1, 3).equal(torch.full((1, 3), 0.3))
    assert not shaped(part, scores, advantages=0.3).expand(1, 3).equal(torch.full((1, 3), 0.3))


def test_gate_follows_the_batch_before():
    part, states = warmed(), []
    for share in (1.0, 0.94, 0.92, 0.95, 1.0, 1.06, 1.08, 0.94):
        shaped(part, scores_of([2.0 * share], [[-1.0, 0.5, 1.0]]))
        states.append(part.state_dict()["is_open"])
    assert states == [True, True, False, False, False, False, True, True]
    part._past["is_open"] = False
    scores = scores_of([2.5], [[-1.0, 0.5, 1.0]])
    assert shaped(part, scores).expand(1, 3).equal(torch.zeros(1, 3))
    assert not shaped(part, scores).expand(1, 3).equal(torch.zeros(1, 3))  # it has opened after that one


def test_references_are_those_of_all_processes():
    whole, half = StandardisedAway(warmup_steps=1), StandardisedAway(warmup_steps=1)
    given = [[1.5], [2.5]], [[-1.0, 0.5], [2.0, 0.25]]
    shaped(whole, scores_of([1.5, 2.5], given[1]))
    parts = [scores_of(its, [deltas]) for its, deltas in zip(*given, strict=True)]

    def gather(own):  # of the first process
        if own.dtype == torch.float64:
            other = parts[1].delta.double()
            return torch.cat([own, torch.stack([other.new_tensor(2.0), other.sum(), other.square().sum()]).view(1, 3)])
        return torch.cat([own, torch.tensor([[2.5]])])

    half(replace(make_batch(parts[0].known), gather=gather), parts[0])
    assert half._references() == pytest.approx(whole._references())
    assert whole._references()[0] == pytest.approx(2.0)
    assert whole._references()[1] == pytest.approx(torch.tensor([-1.0, 0.5, 2.0, 0.25]).std(correction=0).item())


def test_evaluation_is_not_remembered():
    part = StandardisedAway()
    shaped(part, make_scores(), is_training=False)
    assert part.state_dict()["num_batches"] == 0


def test_memory_goes_on():
    part, resumed = warmed(), StandardisedAway(warmup_steps=1)
    resumed.load_state_dict(part.state_dict())
    scores = scores_of([2.5], [[-1.0, 0.5, 1.0]])
    assert shaped(resumed, scores).equal(shaped(part, scores))
    assert resumed.state_dict() == part.state_dict()


def test_off_or_without_a_difference_it_is_grpo():
    assert not StandardisedAway(strength=0.0).needs_scores
    batch = make_batch(torch.ones(1, 3, dtype=torch.bool), advantages=0.123456789)
    assert StandardisedAway(strength=0.0)(batch, None) is batch.advantages
    found = shaped(warmed(), scores_of([2.5], [[0.0, 0.0, 0.0]]), advantages=0.123456789)
    assert found.equal(torch.full((1, 3), 0.123456789))


def test_exchanging_the_two_is_no_change_of_sign():
    known = torch.ones(1, 3, dtype=torch.bool)
    one, other = (
        StandardisedAway._pushes(make_scores(p_s=p_s, p_t=p_t).delta, known, deviation=10.0)
        for p_s, p_t in ((P_S, P_T), (P_T, P_S))
    )
    assert (one + other).abs().max() > 0.02


def test_a_warmup_is_needed():
    with pytest.raises(ValueError, match="`warmup_steps` must be at least 1, got 0"):
        StandardisedAway(warmup_steps=0)
