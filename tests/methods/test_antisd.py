import math

import pytest
import torch
from three_tokens import P_S, P_T, advantages_of, make_scores

from trl_opsd.methods.antisd import AwayFromTeacher


PHI = [-0.202733, 0.143841, 0.346574]


def test_exact_values():
    found = advantages_of(AwayFromTeacher(strength=1.0), 0.0, make_scores())
    assert found.tolist() == [pytest.approx([-value for value in PHI], abs=1e-6)]


def test_is_added_whatever_the_sign_of_the_advantage():
    """So that a group that is all right or all wrong learns too."""
    for advantage in (1.0, 0.0, -1.0):
        found = advantages_of(AwayFromTeacher(strength=0.5), advantage, make_scores())
        assert found.tolist() == [pytest.approx([advantage - 0.5 * value for value in PHI], abs=1e-6)]


def test_expected_gradient_ascends_the_jensen_shannon_divergence():
    logits = torch.tensor(P_S).log().requires_grad_()
    p_s, p_t = torch.softmax(logits, 0), torch.tensor(P_T)
    middle = (p_s + p_t) / 2
    jsd = 0.5 * (p_s * (p_s / middle).log()).sum() + 0.5 * (p_t * (p_t / middle).log()).sum()
    assert jsd.item() == pytest.approx(0.091121, abs=1e-6)
    (expected,) = torch.autograd.grad(jsd, logits)
    assert expected.tolist() == pytest.approx([0.095342, -0.056301, -0.039040], abs=2e-6)

    advantages = advantages_of(AwayFromTeacher(strength=1.0), 0.0, make_scores())[0]
    surrogate = (torch.tensor(P_S) * advantages * torch.log_softmax(logits, 0)).sum()
    torch.testing.assert_close(torch.autograd.grad(surrogate, logits)[0], expected, rtol=1e-5, atol=1e-6)


def test_exchanging_the_two_is_no_change_of_sign():
    exchanged = advantages_of(AwayFromTeacher(1.0), 0.0, make_scores(p_s=P_T, p_t=P_S))
    assert (exchanged + advantages_of(AwayFromTeacher(1.0), 0.0, make_scores())).abs().max() > 0.1


def test_bonus_is_bounded():
    certain = make_scores(p_s=(0.999, 0.0005, 0.0005), p_t=(1e-9, 0.5, 0.5))
    assert advantages_of(AwayFromTeacher(1.0), 0.0, certain).max() <= 0.5 * math.log(2.0) + 1e-6


def test_off_or_without_a_difference_it_is_grpo():
    assert not AwayFromTeacher(strength=0.0).needs_scores
    advantage = torch.tensor(0.123456789).expand(1, 3)
    assert advantages_of(AwayFromTeacher(strength=0.0), 0.123456789, make_scores()).equal(advantage)
    torch.testing.assert_close(advantages_of(AwayFromTeacher(), 0.123456789, make_scores(p_t=P_S)), advantage)
    unread = advantages_of(AwayFromTeacher(), 0.123456789, make_scores(known=(True, False, True)))
    assert unread[0, 1] == advantage[0, 1]
