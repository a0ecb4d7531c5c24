"""Exact values on three tokens, which were worked out apart from this library: S = (.6, .3, .1), T = (.2, .3, .5)."""

import pytest
import torch

from trl_opsd.objective import Head, Objective, fused_divergence


P_S, P_T = (0.6, 0.3, 0.1), (0.2, 0.3, 0.5)
REVERSE, FORWARD = {"divergence": "reverse_kl"}, {"divergence": "forward_kl"}
TOP_1, TOP_2 = ({"support": "student_top_k", "top_k": k} for k in (1, 2))


def divergence(shift=0.0, **settings):
    """Of one token, and its gradient with respect to the student's logits."""
    logits, teacher = torch.tensor([P_S]).log().requires_grad_(), torch.tensor([P_T]).log() + shift
    head = Head(torch.eye(3))
    given = torch.tensor([0]), torch.ones(1), Objective(**settings)
    loss = fused_divergence(logits, teacher, head, head, *given).loss
    return loss.item(), torch.autograd.grad(loss, logits)[0][0].tolist()


@pytest.mark.parametrize(
    ("settings", "value", "gradient"),
    [
        (REVERSE, 0.498224, [0.36023, -0.14947, -0.21077]),
        (FORWARD, 0.584996, [0.4, 0.0, -0.4]),
        (REVERSE | TOP_2, 0.498224, [0.36023, -0.14947, -0.21077]),  # the rest is one token
        (REVERSE | {"ratio_low": 0.2, "ratio_high": 5.0}, 0.498224, None),
        # Its sum is no divergence, and it pushes down the very token that the teacher prefers
        (FORWARD | {"clip": 0.05}, -0.169722, [0.1, -0.15, 0.05]),
        ({"divergence": "jsd", "jsd_weight": 0.25}, 0.098780, None),
        ({"divergence": "jsd", "jsd_weight": 0.5}, 0.125101, None),
        ({"divergence": "jsd", "jsd_weight": 0.75}, 0.092174, None),
        (REVERSE | TOP_1, 0.381909, None),
        (FORWARD | TOP_1, 0.334795, None),
        ({"divergence": "jsd"} | TOP_1, 0.086305, None),
        (REVERSE | TOP_2 | {"tail": "renormalize"}, 0.144622, None),
        (FORWARD | TOP_2 | {"tail": "renormalize"}, 0.148342, None),
    ],
    ids=str,
)
def test_exact_values(settings, value, gradient):
    found, slopes = divergence(**settings)
    assert found == pytest.approx(value, abs=2e-6)
    # A constant more of all the teacher's logits is the same distribution
    shifted, its_slopes = divergence(shift=3.0, **settings)
    assert [shifted, *its_slopes] == pytest.approx([found, *slopes], abs=2e-6)
    assert gradient is None or slopes == pytest.approx(gradient, abs=1e-5)
