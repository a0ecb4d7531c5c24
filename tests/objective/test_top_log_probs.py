import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective.plain import make_case

from trl_opsd.objective import Objective, TopLogProbs


def top_log_probs(case, k):
    """What a server would report of the case's teacher."""
    logits = case.teacher_head.finish.logits(case.teacher_hidden @ case.teacher_head.weight.T)
    log_p = logits.log_softmax(dim=-1).detach()
    top = log_p.topk(k)
    sampled = log_p.gather(1, case.token_ids.unsqueeze(1)).squeeze(1)
    return TopLogProbs(top.indices, top.values, case.token_ids, sampled)


def served(case, k):
    return case.replace(teacher_hidden=top_log_probs(case, k), teacher_head=None)


OBJECTIVES = [
    Objective(divergence, jsd_weight=0.3, support=support, top_k=3, tail=tail, clip=clip)
    for divergence in ("forward_kl", "reverse_kl", "jsd")
    for support, tail in (("teacher_top_k", "bucket"), ("teacher_top_k", "renormalize"), ("sampled_token", "bucket"))
    for clip in (None, 0.05)
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_equals_the_loss_with_the_teachers_hidden_states(objective):
    case = make_case()
    expected, output = (one.fused(objective) for one in (case, served(case, 3)))

    for name in expected._fields:
        if name != "teacher_entropy":
            torch.testing.assert_close(getattr(output, name), getattr(expected, name), msg=name)
    assert (output.teacher_entropy >= expected.teacher_entropy - 1e-9).all()
    gradients = [torch.autograd.grad(one.loss, case.leaves) for one in (expected, output)]
    torch.testing.assert_close(gradients[1], gradients[0])


@given(seed=st.integers(0, 1000), k=st.integers(1, 13))
def test_distribution_is_whole_and_keeps_what_is_known(seed, k):
    vocabulary = 13
    generator = torch.Generator().manual_seed(seed)
    log_p = (3 * torch.randn(5, vocabulary, generator=generator, dtype=torch.float64)).log_softmax(dim=-1)
    sampled = torch.randint(vocabulary, (5,), generator=generator)
    top = log_p.topk(k)
    known = TopLogProbs(top.indices, top.values, sampled, log_p.gather(1, sampled.unsqueeze(1)).squeeze(1))

    written = torch.empty_like(log_p)
    known.write_log_probs(written)

    torch.testing.assert_close(written.exp().sum(dim=1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(written.gather(1, top.indices), top.values)
    torch.testing.assert_close(written.gather(1, sampled.unsqueeze(1)).squeeze(1), known.sampled_log_probs)
    assert (written <= top.values[:, -1:] + 1e-12).sum(dim=1).ge(vocabulary - k).all()


def test_probability_that_rounds_to_one_leaves_a_finite_loss():
    known = TopLogProbs(torch.tensor([[1, 2]]), torch.tensor([[0.0, -30.0]]), torch.tensor([1]), torch.tensor([0.0]))
    written = torch.empty(1, 50)
    known.write_log_probs(written)
    assert written.isfinite().all()
    assert written.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


def test_row_the_server_could_not_score_is_left_out():
    case = make_case()
    teacher = top_log_probs(case, 3)
    teacher.top_log_probs[1, 2] = torch.nan
    output = case.replace(teacher_hidden=teacher, teacher_head=None).fused(Objective(support="teacher_top_k", top_k=3))

    assert output.finite.tolist() == [index != 1 for index in range(len(case.token_ids))]
    (grad, *_) = torch.autograd.grad(output.loss, case.leaves)
    assert grad.isfinite().all()
    assert not grad[1].any()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Objective(support="full", top_k=3), "support='full'"),
        (Objective(support="student_top_k", top_k=3), "support='student_top_k'"),
        (Objective(support="union_top_k", top_k=3), "support='union_top_k'"),
        (Objective(support="teacher_top_k", top_k=4), "3 tokens are known"),
        (Objective(support="teacher_top_k", top_k=3, temperature=1.1), "another temperature"),
    ],
)
def test_objectives_it_does_not_determine_are_refused(objective, message):
    with pytest.raises(ValueError, match=message):
        served(make_case(), 3).fused(objective)
