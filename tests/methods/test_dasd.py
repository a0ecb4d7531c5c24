import pytest
import torch
from three_tokens import make_batch

from trl_opsd.methods.dasd import DirectionByEntropy
from trl_opsd.signal import TokenScores


ENTROPY = torch.tensor([0.1, 0.2, 0.4, 0.8, 1.6])
DELTA = torch.tensor([0.1, -0.2, 0.4, -0.8, 1.0])
OMEGA = torch.tensor([0.0548, -0.0163, -0.2208, -0.6366, -0.8140])


def shaped(part, advantage, entropies, deltas, **given):
    """Of rollouts of different lengths, the rest of which is not known."""
    width = max(map(len, entropies))
    entropy, delta, known = torch.zeros(3, len(entropies), width)
    for row, values in enumerate(entropies):
        entropy[row, : len(values)], delta[row, : len(values)] = values, deltas[row]
        known[row, : len(values)] = 1
    nothing = torch.zeros_like(delta)
    scores = TokenScores(known.bool(), nothing, delta, entropy, nothing, nothing)
    return part(make_batch(known.bool(), advantages=advantage, **given), scores)


def test_exact_values():
    found = shaped(DirectionByEntropy(strength=1.0, epsilon=1e-8), 0.0, [ENTROPY], [DELTA])
    torch.testing.assert_close(found[0], OMEGA * DELTA / 0.4, rtol=0, atol=2e-4)
    assert (found[0].sign() == (0.18 - ENTROPY).sign() * DELTA.sign()).all()


def test_statistics_are_those_of_a_rollout():
    alone = shaped(DirectionByEntropy(), 0.3, [ENTROPY], [DELTA])
    longer = torch.tensor([0.5, 0.7, 3.0, 0.1, 0.9, 0.2, 0.3]), torch.tensor([2.0, 0.1, -0.3, 0.5, 0.2, 0.6, -1.0])
    beside = shaped(DirectionByEntropy(), 0.3, [ENTROPY, longer[0]], [DELTA, longer[1]])
    assert beside[:1, :5].equal(alone)
    assert beside[0, 5:].tolist() == [pytest.approx(0.3)] * 2


@pytest.mark.parametrize("deltas", [torch.zeros(5), torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])])
def test_teacher_that_is_the_student_almost_everywhere(deltas):
    """The median is 0."""
    found = shaped(DirectionByEntropy(), 0.3, [ENTROPY], [deltas])
    assert found.isfinite().all()
    assert found[0, :4].tolist() == [pytest.approx(0.3)] * 4


def test_share_of_tokens_that_are_pulled_is_logged():
    """Of five entropies, the first is below the quantile, and a token alone is at it."""
    logged = {}
    given = {"log": lambda name, *pair: logged.update({name: tuple(map(int, pair))})}
    shaped(DirectionByEntropy(), 0.3, [ENTROPY, ENTROPY[:1]], [DELTA, DELTA[:1]], **given)
    assert logged == {"direction/pulled_token_rate": (1, 6)}


def test_off_it_is_grpo():
    off = DirectionByEntropy(strength=0.0)
    assert not off.needs_scores
    advantages = torch.tensor([[0.123456789]])
    assert off(make_batch(torch.ones(1, 5).bool(), advantages=advantages), None).equal(advantages)
    assert shaped(off, 0.123456789, [ENTROPY], [DELTA]).equal(advantages.expand(1, 5))


def test_quantile_is_one():
    with pytest.raises(ValueError, match=r"`quantile` must be in \[0, 1\]"):
        DirectionByEntropy(quantile=1.5)
