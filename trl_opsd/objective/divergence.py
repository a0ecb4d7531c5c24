"""The pointwise divergences between a teacher and a student distribution, and their gradients.

Notation, after [Self-Distilled Reasoner](https://huggingface.co/papers/2601.18734): `log_s` and `log_t` are the
log-probabilities log p_S and log p_T of the student and the teacher over the vocabulary, and a divergence is the sum
over the vocabulary of its entries ℓ_v.
"""

import math
from typing import Literal

import torch


Divergence = Literal["forward_kl", "reverse_kl", "jsd", "student_rewards", "teacher_rewards", "even_rewards"]
# Of a token of a support, by whose probability it is weighted
REWARDS = ("student_rewards", "teacher_rewards", "even_rewards")


def pointwise_divergence(
    log_s: torch.Tensor,
    log_t: torch.Tensor,
    divergence: Divergence,
    jsd_weight: float = 0.5,
    p_s: torch.Tensor | None = None,
    p_t: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Entries of a divergence over the vocabulary, and their slopes.

    Entries of probability 0 under the distribution the expectation is taken over contribute 0, also where the other
    log-probability is `-inf`.

    Args:
        log_s (`torch.Tensor` of shape `(..., V)`):
            Student log-probabilities.
        log_t (`torch.Tensor` of shape `(..., V)`):
            Teacher log-probabilities.
        divergence (`str`):
            `"forward_kl"`: KL(p_T ‖ p_S). `"reverse_kl"`: KL(p_S ‖ p_T). `"jsd"`: β·KL(p_T ‖ m) + (1−β)·KL(p_S ‖ m), m
            = β·p_T + (1−β)·p_S, Eq. (1) of [GKD](https://huggingface.co/papers/2306.13649). Others: see [`rewards`].
        jsd_weight (`float`, *optional*, defaults to `0.5`):
            β. The formula tends to 0 at both ends, so, as in GKD, 0 stands for the forward and 1 for the reverse KL.
        p_s (`torch.Tensor` of shape `(..., V)`, *optional*):
            Student probabilities, where they are at hand: it saves their exponentials.
        p_t (`torch.Tensor` of shape `(..., V)`, *optional*):
            Teacher probabilities.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the entries ℓ_v and the slopes d_v = ∂ℓ_v/∂log p_S,v, each of shape `(...,
        V)`.
    """
    divergence = canonical(divergence, jsd_weight)
    if divergence in REWARDS:
        return rewards(log_s, log_t, divergence)
    p_s = log_s.exp() if p_s is None else p_s
    p_t = log_t.exp() if p_t is None else p_t
    if divergence == "forward_kl":
        return expectation(p_t, log_t - log_s), -p_t
    if divergence == "reverse_kl":
        entries = expectation(p_s, log_s - log_t)
        return entries, entries + p_s
    log_m = (jsd_weight * p_t + (1 - jsd_weight) * p_s).log()
    slopes = (1 - jsd_weight) * expectation(p_s, log_s - log_m)
    return jsd_weight * expectation(p_t, log_t - log_m) + slopes, slopes


def rewards(log_s: torch.Tensor, log_t: torch.Tensor, divergence: Divergence) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Negative rewards of the tokens of a support in a policy gradient, as the released code of [Rethinking
    OPD](https://huggingface.co/papers/2604.13016) has it: A_v = w_v·(log p_T,v − log p_S,v), as data, for each token v
    of the support, whether it was sampled or not. Its loss, −Σ_v A_v·p_S,v / p_old,v, has where the two are the same
    the slopes −A_v.

    Args:
        log_s (`torch.Tensor` of shape `(..., K + 1)`):
            Student log-probabilities of the support, `-inf` for what is listed once more, and of all other tokens
            together, which have no reward.
        log_t (`torch.Tensor` of shape `(..., K + 1)`):
            Teacher log-probabilities.
        divergence (`str`):
            Whose probabilities, divided by their sum over the support, w is: `"student_rewards"`,
            `"teacher_rewards"`; or 1: `"even_rewards"`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: −A_v twice, as entries and as slopes, each of shape `(..., K + 1)`.
    """
    inside_s, inside_t = log_s[..., :-1], log_t[..., :-1]
    weights = {"student_rewards": inside_s, "teacher_rewards": inside_t}.get(divergence)
    costs = inside_s - inside_t
    costs = costs if weights is None else weights.softmax(dim=-1) * costs
    costs = torch.nn.functional.pad(torch.where(inside_s == -torch.inf, 0.0, costs), (0, 1))
    return costs, costs


def sampled_divergence(
    log_s: torch.Tensor, log_t: torch.Tensor, divergence: Divergence, jsd_weight: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Estimates of a divergence and of its gradient from tokens y sampled from the student.

    Both are unbiased: the entry ℓ_y and the slope d_y of [`pointwise_divergence`], divided by p_S,y. Since the mean of
    ∇log p_S,y is 0, a constant added to the slope changes no mean. It is chosen so that the slope is 0 where p_S,y =
    p_T,y.

    Args:
        log_s (`torch.Tensor` of shape `(N, 1)`):
            Student log-probabilities of the sampled tokens.
        log_t (`torch.Tensor` of shape `(N, 1)`):
            Teacher log-probabilities of the sampled tokens.
        divergence (`str`):
            See [`pointwise_divergence`].
        jsd_weight (`float`, *optional*, defaults to `0.5`):
            See [`pointwise_divergence`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the estimates and the slopes, each of shape `(N, 1)`.
    """
    divergence = canonical(divergence, jsd_weight)
    log_ratio = log_t - log_s
    ratio = log_ratio.exp()
    if divergence == "forward_kl":
        return expectation(ratio, log_ratio), 1 - ratio
    if divergence == "reverse_kl":
        return -log_ratio, -log_ratio
    log_mixture = (jsd_weight * ratio + (1 - jsd_weight)).log()  # relative to the student's probability
    slopes = (jsd_weight - 1) * log_mixture
    return jsd_weight * expectation(ratio, log_ratio - log_mixture) + slopes, slopes


def bounded(log_s: torch.Tensor, log_t: torch.Tensor, low: float | None, high: float | None) -> torch.Tensor:
    """
    The teacher's log-probabilities, with its probabilities kept between `low` and `high` times the student's.

    What comes of it is data, through which no gradient goes to the student, and no distribution: the divergence from
    it may be negative.

    Args:
        log_s (`torch.Tensor`):
            Student log-probabilities.
        log_t (`torch.Tensor` of the same shape):
            Teacher log-probabilities.
        low (`float`, *optional*):
            Least ratio of the teacher's probability to the student's.
        high (`float`, *optional*):
            Largest ratio.
    """
    if low is not None:
        log_t = torch.maximum(log_t, log_s + math.log(low))
    return log_t if high is None else torch.minimum(log_t, log_s + math.log(high))


def canonical(divergence: Divergence, jsd_weight: float) -> Divergence:
    """The divergence meant: a JSD of weight 0 or 1 stands for a KL."""
    if divergence == "jsd" and jsd_weight in (0.0, 1.0):
        return "forward_kl" if jsd_weight == 0.0 else "reverse_kl"
    return divergence


def expectation(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """p·x with 0 wherever p is 0, even if x is infinite or undefined there. A p that is NaN stays NaN."""
    return torch.where(p == 0, 0.0, p * x)
