import pytest
import torch
from three_tokens import P_S, P_T

from trl_opsd.methods import config_class
from trl_opsd.objective import Head, fused_divergence


def rewarded(tmp_path, **settings):
    """The loss of one token, and its gradient with respect to the student's logits."""
    logits, teacher = (torch.tensor([p]).log() for p in (P_S, P_T))
    logits.requires_grad_()
    args = config_class("rethinking_opd_code")(str(tmp_path), use_cpu=True, **settings)
    head = Head(torch.eye(3))
    output = fused_divergence(logits, teacher, head, head, torch.tensor([0]), torch.ones(1), args.objective())
    return output.loss.item(), torch.autograd.grad(output.loss, logits)[0][0].tolist()


def of(rewards):
    """−Σ A, and −Σ A ∇log p_S."""
    total = sum(rewards)
    return -total, [p * total - a for p, a in zip(P_S, rewards, strict=True)]


def test_exact_values(tmp_path):
    """The student's first two tokens have the rewards −.732408 and .170275."""
    value, gradient = rewarded(tmp_path, divergence_top_k=2)
    expected, slopes = of((-0.732408, 0.170275, 0.0))
    assert value == pytest.approx(expected, abs=2e-6)
    assert gradient == pytest.approx(slopes, abs=2e-6)


@pytest.mark.parametrize(
    ("weights", "rewards"),
    [("teacher_rewards", (-0.313889, 0.364876, 0.0)), ("even_rewards", (-1.098612, 0.510826, 0.0))],
)
def test_other_weights(tmp_path, weights, rewards):
    value, gradient = rewarded(tmp_path, divergence=weights, divergence_top_k=2)
    expected, slopes = of(rewards)
    assert value == pytest.approx(expected, abs=2e-6)
    assert gradient == pytest.approx(slopes, abs=2e-6)


def test_over_the_whole_vocabulary_its_gradient_is_the_reverse_kls(tmp_path):
    value, gradient = rewarded(tmp_path, divergence_top_k=3)
    assert value == pytest.approx(0.396058, abs=2e-6)
    assert gradient == pytest.approx([0.421532, -0.272065, -0.149467], abs=2e-6)
