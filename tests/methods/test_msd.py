import math

import pytest
import torch
from three_tokens import P_S, P_T

from trl_opsd.methods.msd import DualPerspective
from trl_opsd.objective import Head, teacher_choices


NONE = 1e-30  # as a probability that has a logarithm


def choices(p_s=(P_S,), p_t=(P_T,), top_k=3):
    states = [torch.tensor(p).log() for p in (p_s, p_t)]
    head = Head(torch.eye(len(P_S)))
    return teacher_choices(*states, head, head, top_k)


def weights(*distributions, top_k=3, mask=None):
    """Of a rollout, a token of each pair of distributions."""
    entropy, log_probs = choices(*zip(*distributions, strict=True), top_k=top_k)
    mask = torch.ones(1, len(distributions), dtype=torch.bool) if mask is None else torch.tensor([mask])
    return DualPerspective(top_k)(mask, entropy.unsqueeze(0), log_probs.unsqueeze(0))[0]


def test_exact_values():
    entropy, log_probs = choices()
    assert entropy.item() == pytest.approx(1.029653, abs=1e-6)
    certainty = 1 - entropy.item() / math.log(3)
    assert certainty == pytest.approx(0.062769, abs=1e-6)
    assert 1 - math.exp(log_probs.item()) == pytest.approx(0.7)  # of token 1, which the teacher prefers
    assert certainty * 0.7 == pytest.approx(0.043939, abs=1e-6)
    # Beside a token whose weight is 1, as the teacher is certain of what the student never writes
    found = weights((P_S, P_T), ((1.0, NONE, NONE), (NONE, 1.0, NONE)))
    assert found.tolist() == pytest.approx([2 * 0.043939 / 1.043939, 2 / 1.043939], abs=1e-5)


def test_entropy_of_the_top_k_is_renormalised():
    entropy, _ = choices(top_k=2)
    q = torch.tensor([0.5, 0.3]) / 0.8
    assert entropy.item() == pytest.approx(-(q * q.log()).sum().item(), abs=1e-6)


def test_weights_have_a_mean_of_one_in_every_rollout():
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    entropy = math.log(8) * torch.rand(3, 6, generator=generator)
    found = DualPerspective(8)(mask, entropy, -torch.rand(3, 6, generator=generator))
    assert found.sum(dim=1).tolist() == pytest.approx([6.0, 2.0, 4.0])
    assert not found[~mask].any()


def test_equal_weights_are_plain_msd():
    assert weights((P_S, P_T), (P_S, P_T), (P_S, P_T)).tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize(
    ("p_s", "p_t"),
    [
        (P_S, (1 / 3, 1 / 3, 1 / 3)),  # a teacher that has no opinion
        ((NONE, 1.0, NONE), P_T),  # a student that writes what the teacher would
    ],
)
def test_tokens_of_no_weight(p_s, p_t):
    others = ((0.6, 0.3, 0.1), (0.1, 0.1, 0.8))
    assert weights((p_s, p_t), others).tolist() == pytest.approx([0.0, 2.0], abs=1e-5)


def test_a_rollout_without_any_weight_teaches_nothing():
    found = DualPerspective(3)(torch.ones(1, 2, dtype=torch.bool), torch.full((1, 2), math.log(3)), torch.zeros(1, 2))
    assert found.tolist() == [[0.0, 0.0]]


def test_what_is_not_finite_has_no_weight():
    mask, entropy = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0.5, math.nan, 0.5]])
    found = DualPerspective(3)(mask, entropy, torch.full((1, 3), -1.0))
    assert found.tolist() == [[1.0, 0.0, 1.0]]


def test_the_token_is_the_teachers_choice_and_not_the_sampled_one():
    """Which nobody tells it: the student's probability of each other token gives another weight."""
    _, log_probs = choices()
    assert log_probs.exp().item() == pytest.approx(P_S[1])
    assert P_S[1] not in (P_S[0], P_S[2])


def test_wide_vocabularies_in_blocks():
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(37, 16, generator=generator) for _ in range(2)]
    heads = [Head(torch.randn(3000, 16, generator=generator), torch.randn(3000, generator=generator)) for _ in "st"]
    entropy, log_probs = teacher_choices(*states, *heads, 5, temperature=0.7, memory_budget=0.1)
    logits = [(state @ head.weight.t() + head.bias) / 0.7 for state, head in zip(states, heads, strict=True)]
    top = logits[1].topk(5)
    q = top.values.softmax(dim=1)
    torch.testing.assert_close(entropy, -(q * q.log()).sum(dim=1), rtol=1e-4, atol=1e-5)
    expected = logits[0].log_softmax(dim=1).gather(1, top.indices[:, :1])[:, 0]
    torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-5)


def test_bad_numbers():
    with pytest.raises(ValueError, match="`top_k` must be at least 2, got 1"):
        DualPerspective(1)
    with pytest.raises(ValueError, match="`top_k` must be at most 3, the tokens of the vocabulary, got 4"):
        choices(top_k=4)
