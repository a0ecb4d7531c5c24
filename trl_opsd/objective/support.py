"""Restricting two distributions over the vocabulary to a few of its tokens."""

from collections.abc import Sequence

import torch

from .objective import Objective


CHUNK = 64


def chunk_maxima(scores: torch.Tensor) -> torch.Tensor:
    """
    Maxima of consecutive chunks of the vocabulary, which the row's maximum and its top k are found from.

    Args:
        scores (`torch.Tensor` of shape `(N, V)`):
            Anything.

    Returns:
        `torch.Tensor` of shape `(N, ceil(V / 64))`.
    """
    whole = scores.size(1) - scores.size(1) % CHUNK
    maxima = scores[:, :whole].unflatten(1, (-1, CHUNK)).amax(dim=-1)
    if whole == scores.size(1):
        return maxima
    return torch.cat([maxima, scores[:, whole:].amax(dim=-1, keepdim=True)], dim=1)


def top_k_tokens(scores: Sequence[torch.Tensor], maxima: Sequence[torch.Tensor], k: int) -> tuple[torch.Tensor, ...]:
    """
    The tokens with the k highest scores, in no particular order.

    They lie in the k chunks with the highest maxima, so that little of a wide row is sorted. Several distributions are
    searched at once, since a search is parallel over rows.

    Args:
        scores (sequence of `torch.Tensor` of shape `(N, V)`):
            Anything that grows with the probability, of each distribution.
        maxima (sequence of `torch.Tensor` of shape `(N, ceil(V / 64))`):
            Their [`chunk_maxima`].
        k (`int`):
            Number of tokens, at most V.

    Returns:
        `tuple` of `torch.Tensor` of shape `(N, k)`, int64: the tokens of each distribution.
    """
    vocabulary = scores[0].size(1)
    if vocabulary < 4 * k * CHUNK:
        return tuple(rows.topk(k, sorted=False).indices for rows in scores)
    whole = vocabulary - vocabulary % CHUNK
    chunks = torch.cat([rows[:, : whole // CHUNK] for rows in maxima]).topk(k, sorted=False).indices
    within = torch.arange(CHUNK, device=chunks.device)
    tokens = (chunks.unsqueeze(-1) * CHUNK + within).flatten(1)
    rest = torch.arange(whole, vocabulary, device=chunks.device).expand(tokens.size(0), -1)
    tokens = torch.cat([tokens, rest], dim=1)
    candidates = torch.cat([rows.gather(1, at) for rows, at in zip(scores, tokens.chunk(len(scores)), strict=True)])
    return tokens.gather(1, candidates.topk(k, sorted=False).indices).chunk(len(scores))


def select_support(
    objective: Objective, student_top: torch.Tensor, teacher_top: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The tokens of a top-k support.

    Args:
        objective ([`Objective`]):
            Its `support`.
        student_top (`torch.Tensor` of shape `(N, k)`):
            The student's top-k tokens.
        teacher_top (`torch.Tensor` of shape `(N, k)`):
            The teacher's top-k tokens.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: token ids of shape `(N, K)`, and a mask of the same shape that is False
        where a token is listed once more. An intersection without a token becomes one of the student's.
    """
    if objective.support == "intersection_top_k":
        common = (student_top.unsqueeze(2) == teacher_top.unsqueeze(1)).any(dim=2)
        first = common.int().argmax(dim=1, keepdim=True)  # one of the student's, if they have none in common
        common = common.scatter(1, first, True)
        return torch.where(common, student_top, student_top.gather(1, first)), common
    if objective.support == "union_top_k":
        repeated = (student_top.unsqueeze(2) == teacher_top.unsqueeze(1)).any(dim=2)
        tokens = torch.cat([teacher_top, student_top], dim=1)
        return tokens, torch.cat([torch.ones_like(repeated), ~repeated], dim=1)
    tokens = teacher_top if objective.support == "teacher_top_k" else student_top
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def support_tokens(
    objective: Objective,
    student_scores: torch.Tensor,
    teacher_scores: torch.Tensor,
    student_maxima: torch.Tensor | None = None,
    teacher_maxima: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The tokens of a top-k support, from scores over the vocabulary. Only the sides it names are searched.

    Args:
        objective ([`Objective`]):
            Its `support` and `top_k`.
        student_scores (`torch.Tensor` of shape `(N, V)`):
            Anything that grows with the student's probability.
        teacher_scores (`torch.Tensor` of shape `(N, V)`):
            The teacher's.
        student_maxima (`torch.Tensor` of shape `(N, ceil(V / 64))`, *optional*):
            Their [`chunk_maxima`], where they are at hand.
        teacher_maxima (`torch.Tensor` of shape `(N, ceil(V / 64))`, *optional*):
            The teacher's.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: see [`select_support`].
    """
    student, teacher = (student_scores, student_maxima), (teacher_scores, teacher_maxima)
    both = [student, teacher]
    sides = {"student_top_k": [student], "teacher_top_k": [teacher]}
    sides |= {"union_top_k": both, "intersection_top_k": both}
    searched = [
        (scores, chunk_maxima(scores) if maxima is None else maxima) for scores, maxima in sides[objective.support]
    ]
    scores, maxima = zip(*searched, strict=True)
    tops = top_k_tokens(scores, maxima, min(objective.top_k, student_scores.size(1)))
    return select_support(objective, tops[0], tops[-1])


def restrict(log_p: torch.Tensor, tokens: torch.Tensor, kept: torch.Tensor, objective: Objective) -> torch.Tensor:
    """
    Log-probabilities over a support.

    Args:
        log_p (`torch.Tensor` of shape `(N, V)`):
            Log-probabilities over the vocabulary.
        tokens (`torch.Tensor` of shape `(N, K)`):
            The support.
        kept (`torch.Tensor` of shape `(N, K)`):
            False where a token is to be left out: it gets probability 0.
        objective ([`Objective`]):
            Its `tail`.

    Returns:
        `torch.Tensor` of shape `(N, K + 1)` whose last entry is the probability of all other tokens, or of shape `(N,
        K)` with `tail="renormalize"`.
    """
    inside = log_p.gather(1, tokens)
    if objective.tail == "renormalize":
        return join(inside, None, kept)
    # Summed over the outside, not as 1 − (inside), which would lose the tail of a peaked distribution to rounding
    return join(inside, log_p.scatter(1, tokens, -torch.inf).logsumexp(dim=-1, keepdim=True), kept)


def join(inside: torch.Tensor, outside: torch.Tensor | None, kept: torch.Tensor) -> torch.Tensor:
    """
    A distribution over a support, from the log-probabilities of its tokens and of all others together.

    Args:
        inside (`torch.Tensor` of shape `(N, K)`):
            Log-probabilities of the tokens.
        outside (`torch.Tensor` of shape `(N, 1)`, *optional*):
            That of all others. `None` renormalises.
        kept (`torch.Tensor` of shape `(N, K)`):
            False where a token is to be left out.

    Returns:
        `torch.Tensor`: see [`restrict`].
    """
    inside = inside.masked_fill(~kept, -torch.inf)
    return inside.log_softmax(dim=-1) if outside is None else torch.cat([inside, outside], dim=1)


def spread(
    slopes: torch.Tensor, log_s: torch.Tensor, restricted: torch.Tensor, tokens: torch.Tensor, objective: Objective
) -> torch.Tensor:
    """
    Gradient with respect to the student's logits, from the slopes over a support.

    With q the student's distribution over the support, ∂/∂z_v = d_v − q_v Σ_u d_u for a renormalised support. With a
    bucket, d_v of a token outside is d_bucket · p_v / p_bucket.

    Args:
        slopes (`torch.Tensor` of shape `(N, K)` or `(N, K + 1)`):
            d = ∂ℓ/∂log q, 0 for tokens left out.
        log_s (`torch.Tensor` of shape `(N, V)`):
            Student log-probabilities over the vocabulary.
        restricted (`torch.Tensor` of the shape of `slopes`):
            log q, from [`restrict`].
        tokens (`torch.Tensor` of shape `(N, K)`):
            The support.
        objective ([`Objective`]):
            Its `tail`.

    Returns:
        `torch.Tensor` of shape `(N, V)`.
    """
    inside, outside, total = spread_inside(slopes, restricted, tokens.size(1))
    grad = torch.zeros_like(log_s)
    if outside is not None:
        log_bucket = restricted[:, -1:]
        share = torch.where(log_bucket == -torch.inf, 0.0, (log_s - log_bucket).exp())
        grad = (outside * share - log_s.exp() * total).scatter(1, tokens, 0.0)
    return grad.scatter_add(1, tokens, inside)


def spread_inside(
    slopes: torch.Tensor, restricted: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """
    The gradient of [`spread`] inside the support, and what makes up the one outside.

    Args:
        slopes (`torch.Tensor` of shape `(N, K)` or `(N, K + 1)`):
            d = ∂ℓ/∂log q.
        restricted (`torch.Tensor` of the shape of `slopes`):
            log q.
        num_tokens (`int`):
            K.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]`: the gradient inside, of shape `(N, K)`; d_bucket, of
        shape `(N, 1)`, or `None` without a bucket; and Σ_u d_u, of shape `(N, 1)`.
    """
    total = slopes.sum(dim=-1, keepdim=True)
    inside = (slopes - restricted.exp() * total)[:, :num_tokens]
    return inside, slopes[:, num_tokens:] if slopes.size(1) > num_tokens else None, total
