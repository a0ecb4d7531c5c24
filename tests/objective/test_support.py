import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective.plain import make_case

from trl_opsd.objective import Objective
from trl_opsd.objective.support import chunk_maxima, restrict, select_support, spread, top_k_tokens


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def assert_top_k(scores, k):
    others = -scores.flip(1)
    tokens, other_tokens = top_k_tokens((scores, others), (chunk_maxima(scores), chunk_maxima(others)), k)
    assert torch.equal(others.gather(1, other_tokens).sort(descending=True).values, others.topk(k).values)
    assert tokens.shape == (len(scores), k)
    assert tokens.dtype == torch.int64
    assert all(len(set(row)) == k for row in tokens.tolist())
    found = scores.gather(1, tokens).sort(descending=True).values
    assert torch.equal(found, scores.topk(k).values)  # of equal scores, any will do
    return tokens


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 65, 128, 129, 1000, 4096, 4097])
def test_chunk_maxima(vocabulary):
    scores = torch.randn(3, vocabulary, generator=seeded(vocabulary))

    maxima = chunk_maxima(scores)

    assert maxima.tolist() == [[max(row[i : i + 64]) for i in range(0, vocabulary, 64)] for row in scores.tolist()]
    assert torch.equal(maxima.amax(-1), scores.amax(-1))


@pytest.mark.parametrize("k", [1, 2, 3, 16])
@pytest.mark.parametrize("extra", [-1, 0, 1, 37, 63, 64, 1000])
def test_top_k_tokens_around_the_threshold(k, extra):
    scores = torch.randn(20, 256 * k + extra, generator=seeded(k + extra), dtype=torch.float64)

    tokens = assert_top_k(scores, k)

    assert torch.equal(tokens.sort().values, scores.topk(k).indices.sort().values)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    k=st.integers(1, 6),
    extra=st.integers(-300, 300),
    levels=st.sampled_from([1, 2, 5, 100]),
    blocked=st.sampled_from([0.0, 0.5, 0.999, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_top_k_tokens_with_ties_and_impossible_tokens(k, extra, levels, blocked, seed):
    vocabulary = max(k, 256 * k + extra)
    generator = seeded(seed)
    scores = torch.randint(levels, (4, vocabulary), generator=generator).double()
    scores[torch.rand(4, vocabulary, generator=generator) < blocked] = -math.inf

    assert_top_k(scores, k)


@pytest.mark.parametrize("k", [1, 4])
def test_top_k_tokens_wherever_they_lie(k):
    vocabulary = 256 * k + 30  # the last 30 are no whole chunk
    places = {
        "one chunk": torch.arange(k) + 70,
        "a chunk each": torch.arange(k) * 64 + 63,
        "first": torch.arange(k),
        "rest": vocabulary - 1 - torch.arange(k),
        "start of the rest": 256 * k + torch.arange(k),
        "last whole chunk": 256 * k - 1 - torch.arange(k),
    }
    for place in places.values():
        scores = torch.rand(1, vocabulary, generator=seeded(0))
        scores[0, place] = 2 + torch.rand(k, generator=seeded(1))
        assert set(assert_top_k(scores, k)[0].tolist()) == set(place.tolist())


@pytest.mark.parametrize("vocabulary", [50, 257, 600])
def test_nan_scores_give_tokens_of_the_vocabulary(vocabulary):
    scores = torch.randn(3, vocabulary, generator=seeded(0))
    scores[0], scores[1, 5] = math.nan, math.nan

    (tokens,) = top_k_tokens((scores,), (chunk_maxima(scores),), 2)

    assert ((tokens >= 0) & (tokens < vocabulary)).all()
    assert set(tokens[2].tolist()) == set(scores[2].topk(2).indices.tolist())


STUDENT_TOP, TEACHER_TOP = torch.tensor([[4, 1, 2], [0, 1, 2]]), torch.tensor([[2, 3, 4], [5, 4, 3]])


def test_select_support_by_hand():
    def select(support):
        return select_support(Objective(support=support, top_k=3), STUDENT_TOP, TEACHER_TOP)

    for support, tokens in (("teacher_top_k", TEACHER_TOP), ("student_top_k", STUDENT_TOP)):
        assert torch.equal(select(support)[0], tokens)
        assert select(support)[1].all()
    tokens, kept = select("union_top_k")
    union = [set(row[mask].tolist()) for row, mask in zip(tokens, kept, strict=True)]
    assert union == [{1, 2, 3, 4}, {0, 1, 2, 3, 4, 5}]
    assert kept.sum(-1).tolist() == [4, 6]


def test_select_intersection_by_hand():
    objective = Objective(support="intersection_top_k", top_k=3, tail="renormalize")
    tokens, kept = select_support(objective, STUDENT_TOP, TEACHER_TOP)
    both = [set(row[mask].tolist()) for row, mask in zip(tokens, kept, strict=True)]
    common = [set(s) & set(t) for s, t in zip(STUDENT_TOP.tolist(), TEACHER_TOP.tolist(), strict=True)]
    assert [len(its) for its in common] == [2, 0]
    assert both[0] == common[0]
    assert len(both[1]) == 1  # of nothing
    assert both[1] < set(STUDENT_TOP[1].tolist())
    for row, mask, its in zip(tokens, kept, both, strict=True):
        assert mask.sum() == len(its)
        assert set(row.tolist()) == its


def test_restrict_by_hand():
    log_p = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]], dtype=torch.float64).log()
    tokens, kept = torch.tensor([[0, 2, 0]]), torch.tensor([[True, True, False]])

    bucket = restrict(log_p, tokens, kept, Objective(tail="bucket")).exp()
    renormalized = restrict(log_p, tokens, kept, Objective(tail="renormalize")).exp()

    assert bucket.tolist() == [pytest.approx([0.5, 0.125, 0.0, 0.375])]
    assert renormalized.tolist() == [pytest.approx([0.8, 0.2, 0.0])]


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("whole", [False, True])
def test_spread_is_the_derivative_of_restrict(tail, whole):
    generator = seeded(0)
    logits = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[0, 2, 0, 4, 1, 3][: 6 if whole else 3]]).expand(3, -1)
    kept = torch.ones_like(tokens, dtype=torch.bool)
    kept[:, 2] = False
    log_p = logits.log_softmax(-1)
    restricted = restrict(log_p, tokens, kept, Objective(tail=tail))
    slopes = torch.randn(restricted.shape, generator=generator, dtype=torch.float64) * (restricted > -math.inf)
    finite = restricted.masked_fill(restricted == -math.inf, 0.0)

    (expected,) = torch.autograd.grad((finite * slopes).sum(), logits)
    found = spread(slopes, log_p.detach(), restricted.detach(), tokens, Objective(tail=tail))

    torch.testing.assert_close(found, expected)


def test_spread_beside_a_bucket_too_small_to_divide_by():
    # p/p_bucket of the tokens inside overflows to infinity, and belongs nowhere
    log_s = torch.tensor([[0.0, -95.0, -101.0, -102.0]])
    tokens, objective = torch.tensor([[0, 1]]), Objective()
    restricted = restrict(log_s, tokens, torch.ones_like(tokens, dtype=torch.bool), objective)

    grad = spread(torch.tensor([[0.0, 0.0, 1.0]]), log_s, restricted, tokens, objective)

    share = 1 / (1 + math.exp(-1))
    assert grad.tolist() == [pytest.approx([-1.0, -math.exp(-95), share, 1 - share], rel=1e-5)]


# What is logged of the top k


def test_top_k_overlap_and_mass_by_hand():
    case = make_case(rows=2, vocabulary=5, bias=True)
    student = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    teacher = torch.tensor([0.1, 0.35, 0.02, 0.5, 0.03], dtype=torch.float64)
    case = case.replace(student_hidden=case.student_hidden.detach() * 0, teacher_hidden=case.teacher_hidden * 0)
    case = case.with_biases(student.log(), teacher.log())

    for top_k, overlap, mass in ((1, 0.0, 0.1), (2, 0.5, 0.4), (3, 2 / 3, 0.8), (5, 1.0, 1.0), (7, 1.0, 1.0)):
        output = case.fused(Objective(top_k=top_k))
        assert output.top_k_overlap.tolist() == pytest.approx([overlap] * 2)
        assert output.top_k_mass.tolist() == pytest.approx([mass] * 2)


def test_clipped_mass_by_hand():
    # Forward KL over the teacher's first token and the rest: 3/4 ln(3/2) = 0.304, 1/4 ln(1/2) = -0.173
    case = make_case(rows=1, vocabulary=3, bias=True)
    case = case.replace(student_hidden=case.student_hidden.detach() * 0, teacher_hidden=case.teacher_hidden * 0)
    case = case.with_biases(
        torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log(),
        torch.tensor([0.75, 0.15, 0.10], dtype=torch.float64).log(),
    )

    output = case.fused(Objective(support="teacher_top_k", top_k=1, clip=0.1))

    assert output.clipped.tolist() == [1.0]
    assert output.clipped_mass.item() == pytest.approx(0.75 * math.log(1.5) - 0.1)
    assert output.divergence.item() == pytest.approx(0.1 - 0.25 * math.log(2))
