import pytest
import torch
from three_tokens import P_S, P_T

from trl_opsd.methods import config_class
from trl_opsd.objective import Head, fused_divergence


def divergence(tmp_path, p_s=P_S, p_t=P_T, token=0, **settings):
    """Of one token, and its gradient with respect to the student's logits."""
    logits, teacher = (torch.tensor([p]).log() for p in (p_s, p_t))
    logits.requires_grad_()
    args = config_class("rethinking_opd")(str(tmp_path), use_cpu=True, **settings)
    head = Head(torch.eye(len(p_s)))
    output = fused_divergence(logits, teacher, head, head, torch.tensor([token]), torch.ones(1), args.objective())
    return output.loss.item(), torch.autograd.grad(output.loss, logits)[0][0].tolist()


def test_exact_values(tmp_path):
    """The entries of the paper's renormalised form on the student's first two tokens are .564865 and −.254047."""
    value, gradient = divergence(tmp_path, divergence_top_k=2)
    assert value == pytest.approx(0.564865 - 0.254047, abs=2e-6)
    q = [2 / 3, 1 / 3]
    expected = [0.564865 - q[0] * value, -0.254047 - q[1] * value, 0.0]
    assert gradient == pytest.approx(expected, abs=2e-6)


def test_over_the_whole_vocabulary_it_is_the_reverse_kl(tmp_path):
    value, gradient = divergence(tmp_path, divergence_top_k=3)
    assert value == pytest.approx(0.396058, abs=2e-6)
    assert gradient == pytest.approx([0.421532, -0.272065, -0.149467], abs=2e-6)


@pytest.mark.parametrize(
    ("support", "tokens"),
    [
        ("student_top_k", [0, 1]),
        ("teacher_top_k", [1, 2]),
        ("union_top_k", [0, 1, 2]),
    ],
)
def test_supports(tmp_path, support, tokens):
    value, gradient = divergence(tmp_path, divergence_support=support, divergence_top_k=2)
    q_s, q_t = (torch.tensor(p)[tokens] / torch.tensor(p)[tokens].sum() for p in (P_S, P_T))
    assert value == pytest.approx((q_s * (q_s / q_t).log()).sum().item(), abs=1e-6)
    assert [index for index, slope in enumerate(gradient) if abs(slope) > 1e-6] == tokens


def test_intersection(tmp_path):
    """Of (0, 1, 2) and (1, 2, 3)."""
    p_s, p_t = (0.5, 0.25, 0.15, 0.1), (0.05, 0.3, 0.45, 0.2)
    settings = {"divergence_support": "intersection_top_k", "divergence_top_k": 3}
    value, gradient = divergence(tmp_path, p_s, p_t, **settings)
    q_s, q_t = torch.tensor([0.625, 0.375]), torch.tensor([0.4, 0.6])
    assert value == pytest.approx((q_s * (q_s / q_t).log()).sum().item(), abs=1e-6)
    assert [gradient[0], gradient[3]] == [0.0, 0.0]
    assert abs(gradient[1]) > 0.01


def test_an_intersection_of_one_token_or_none_teaches_nothing(tmp_path):
    settings = {"divergence_support": "intersection_top_k", "divergence_top_k": 2}
    for p_s, p_t in ((P_S, P_T), ((0.4, 0.4, 0.1, 0.1), (0.1, 0.1, 0.4, 0.4))):
        value, gradient = divergence(tmp_path, p_s, p_t, **settings)
        assert value == pytest.approx(0.0, abs=1e-7)
        assert gradient == pytest.approx([0.0] * len(p_s), abs=1e-7)


@pytest.mark.parametrize(("token", "delta"), [(0, -1.098612), (1, 0.510826), (2, 1.098612)])
def test_on_the_sampled_token_it_is_a_policy_gradient(tmp_path, token, delta):
    """With advantage log p_T − log p_S: the code's support of 0 tokens."""
    _, gradient = divergence(tmp_path, token=token, divergence_support="sampled_token")
    expected = [delta * (p - (index == token)) for index, p in enumerate(P_S)]
    assert gradient == pytest.approx(expected, abs=2e-6)
