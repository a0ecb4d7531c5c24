import pytest
import torch
from three_tokens import P_S, P_T, advantages_of, make_scores

from trl_opsd.methods.vopd import ValueBaseline
from trl_opsd.objective import Head, Objective, fused_divergence


def reverse_kl(support, top_k=16):
    """Of the three tokens, by the loss that the trainer scores with."""
    states = [torch.tensor([p]).log() for p in (P_S, P_T)]
    head = Head(torch.eye(3))
    objective = Objective(divergence="reverse_kl", support=support, top_k=top_k, tail="renormalize")
    with torch.no_grad():
        return fused_divergence(*states, head, head, torch.tensor([0]), torch.ones(1), objective).divergence.item()


SUPPORTS = {"full": ("full", 16, 0.396058), "top-2": ("student_top_k", 2, 0.310819)}


@pytest.mark.parametrize(
    ("support", "expected"),
    [("full", [-0.702554, 0.906884, 1.494671]), ("top-2", [-0.787794, 0.821644, 1.409431])],
)
def test_exact_values(support, expected):
    name, top_k, baseline = SUPPORTS[support]
    assert reverse_kl(name, top_k) == pytest.approx(baseline, abs=2e-6)
    found = advantages_of(ValueBaseline(), 0.0, make_scores(divergence=reverse_kl(name, top_k)))
    assert found.tolist() == [pytest.approx(expected, abs=2e-6)]


@pytest.mark.parametrize("baseline", [0.0, *(reverse_kl(name, top_k) for name, top_k, _ in SUPPORTS.values())])
def test_expected_gradient_is_that_of_the_reverse_kl_whatever_the_baseline(baseline):
    logits = torch.tensor(P_S).log().requires_grad_()
    kl = (torch.softmax(logits, 0) * (torch.log_softmax(logits, 0) - torch.tensor(P_T).log())).sum()
    (expected,) = torch.autograd.grad(-kl, logits)
    assert expected.tolist() == pytest.approx([-0.421532, 0.272065, 0.149467], abs=2e-6)

    advantages = advantages_of(ValueBaseline(), 0.0, make_scores(divergence=baseline))[0]
    surrogate = (torch.tensor(P_S) * advantages * torch.log_softmax(logits, 0)).sum()
    torch.testing.assert_close(torch.autograd.grad(surrogate, logits)[0], expected, rtol=1e-5, atol=1e-6)


def test_only_the_full_baseline_centres_the_advantage():
    means = [
        (torch.tensor(P_S) * advantages_of(ValueBaseline(), 0.0, make_scores(divergence=reverse_kl(*its[:2])))).sum()
        for its in SUPPORTS.values()
    ]
    assert means[0].item() == pytest.approx(0.0, abs=1e-6)
    assert abs(means[1].item()) > 0.05


def test_top_k_kl_alone_has_no_expected_gradient():
    """The trap: a KL is the same for every token that might have been sampled, so that it teaches nothing."""
    logits = torch.tensor(P_S).log().requires_grad_()
    surrogate = (torch.tensor(P_S) * reverse_kl("student_top_k", 2) * torch.log_softmax(logits, 0)).sum()
    assert torch.autograd.grad(surrogate, logits)[0].abs().max() < 1e-7


def test_tokens_that_the_teacher_has_not_read_are_left_alone():
    found = advantages_of(ValueBaseline(), 0.0, make_scores(known=(True, False, True), divergence=0.3))
    assert found[0, 1] == 0.0
    assert not ValueBaseline().needs_reward
