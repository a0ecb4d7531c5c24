"""
The loss of a method and its gradient, the long way round: what a trainer is compared with.

Neither the library nor TRL takes part. One row at a time goes through a plain model, all logits are kept, divergences
are summed over the whole vocabulary in float64, and autograd does the rest.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass
class Method:
    """The settings that a loss depends on, under the names of the configuration."""

    divergence: str = "forward_kl"
    jsd_weight: float = 0.5
    support: str = "full"
    top_k: int = 16
    tail: str = "bucket"
    clip: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    bounded: str = "teacher"
    temperature: float = 1.0
    loss_type: str = "grpo"
    max_completion_length: int = 0
    divergence_coef: float = 1.0
    policy_loss_coef: float = 0.0
    likelihood_coef: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float = 0.2


@dataclass
class Row:
    """A rollout. Lists are as long as the completion; what is left out is 1 for every token."""

    prompt: list[int]
    teacher_prompt: list[int] | None  # None: without a context
    completion: list[int]
    by_student: list[int] | None = None  # 0 for what a tool or an environment wrote
    selected: list[int] | None = None  # 0 for what the divergence and the likelihood leave out
    advantage: float | list[float] = 0.0
    old_log_probs: list[float] | None = None  # None: those of the student
    divergence_weights: list[float] | None = None
    likelihood_weights: list[float] | None = None
    reads_context: bool = False  # whether the student reads the teacher's prompt
    objective: dict[str, Any] | None = None  # of its divergence, where that is another than the method's
    target: torch.Tensor | None = None  # in the teacher's place, of shape (T, V)
    images: dict[str, torch.Tensor] | None = None  # what the processor makes of the prompt, but its tokens
    teacher_images: dict[str, torch.Tensor] | None = None


def loss_and_gradient(
    student: torch.nn.Module, teacher: torch.nn.Module, rows: list[Row], method: Method
) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one micro-batch that is all there is. The models stay as they are."""
    student, teacher = plain(student).requires_grad_(), plain(teacher)
    terms: dict[str, list[torch.Tensor]] = {"divergence": [], "policy": [], "likelihood": []}
    masks = {name: [] for name in terms}
    for row in rows:
        token_ids = torch.tensor(row.completion)[:, None]
        by_student = _given(row.by_student, token_ids)
        prompt = row.teacher_prompt if row.reads_context else row.prompt
        p_s = probabilities(student, prompt, row.completion, method.temperature, row.images)
        with torch.no_grad():
            given = row.teacher_prompt or row.prompt, row.completion, method.temperature
            p_t = probabilities(teacher, *given, row.images if row.teacher_prompt is None else row.teacher_images)
        p_t = p_t if row.target is None else row.target
        log_probs = p_s.gather(1, token_ids)[:, 0].log()
        old = log_probs.detach() if row.old_log_probs is None else torch.tensor(row.old_log_probs)
        ratio, advantage = (log_probs - old).exp(), torch.tensor(row.advantage)
        clipped = ratio.clamp(1 - method.epsilon, 1 + method.epsilon_high)
        entries = divergence_entries(p_s, p_t, token_ids, replace(method, **(row.objective or {})))
        divergence = entries.clamp(max=torch.inf if method.clip is None else method.clip).sum(-1)
        terms["divergence"].append(divergence * _given(row.divergence_weights, token_ids))
        terms["policy"].append(-torch.min(ratio * advantage, clipped * advantage))
        terms["likelihood"].append(-log_probs * _given(row.likelihood_weights, token_ids))
        selected = by_student * _given(row.selected, token_ids)
        masks["divergence"].append(selected * (row.teacher_prompt is not None))
        masks["policy"].append(by_student)
        masks["likelihood"].append(selected)
    factors = {
        "divergence": method.divergence_coef,
        "policy": method.policy_loss_coef,
        "likelihood": method.likelihood_coef,
    }
    loss = 0.0
    for name, values in terms.items():
        # In GRPO's term, a row without a token counts as a row of loss 0
        counted = [index for index, mask in enumerate(masks[name]) if name == "policy" or mask.any()]
        if counted:
            some = [values[index] for index in counted], [masks[name][index] for index in counted]
            loss += factors[name] * aggregate(*some, method)
    loss.backward()
    return loss.item(), {name: value.grad for name, value in student.named_parameters() if value.grad is not None}


def plain(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in float64. A `forward` that a trainer has patched would go on to call the original's."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        module.__dict__.pop("forward", None)
        if hasattr(module, "set_experts_implementation"):
            module.set_experts_implementation("eager")  # the others know no float64
    return model


def _given(values: list[Any] | None, token_ids: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(token_ids)) if values is None else torch.tensor(values).float()


def probabilities(
    model: torch.nn.Module,
    prompt: list[int],
    completion: list[int],
    temperature: float,
    images: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The distribution of each token of a completion, of shape (T, V): the logits before a token predict it."""
    given = {
        # No token of a completion stands for an image
        name: torch.nn.functional.pad(value, (0, len(completion))) if name.endswith("token_type_ids") else value
        for name, value in (images or {}).items()
    }
    logits = model(input_ids=torch.tensor([prompt + completion]), **given).logits[0, len(prompt) - 1 : -1]
    return torch.softmax(logits / temperature, dim=-1)


def aggregate(values: list[torch.Tensor], masks: list[torch.Tensor], method: Method) -> torch.Tensor:
    """One number from the tokens of all rows, as `loss_type` says."""
    sums = torch.stack([(value * mask).sum() for value, mask in zip(values, masks, strict=True)])
    counts = torch.stack([mask.sum() for mask in masks])
    if method.loss_type == "grpo":
        return (sums / counts.clamp(min=1)).mean()
    if method.loss_type == "luspo":
        return sums.mean()
    if method.loss_type == "dr_grpo":
        return sums.mean() / method.max_completion_length
    assert method.loss_type in ("bnpo", "dapo")
    return sums.sum() / counts.sum().clamp(min=1)


def divergence_entries(p_s: torch.Tensor, p_t: torch.Tensor, token_ids: torch.Tensor, method: Any) -> torch.Tensor:
    """What a divergence sums of each token, before the clip: of shape (T, entries)."""
    if method.support == "full":
        return entries_of(p_s, bounded(p_s, p_t, method), method)
    if method.support == "sampled_token":
        q_s, q_t = p_s.gather(1, token_ids), p_t.gather(1, token_ids)
        q_t = bounded(q_s, q_t, method)
        values = (entries_of(q_s, q_t, method) / q_s).detach()
        pull = sampled_token_coefficients(q_s, q_t, method).detach() * q_s.log()
        return values + pull - pull.detach()
    teacher, student = top_k_mask(p_t, method.top_k), top_k_mask(p_s, method.top_k)
    both = student & teacher
    if method.divergence.endswith("_rewards"):
        supports = {"student_top_k": student, "teacher_top_k": teacher, "union_top_k": student | teacher}
        return rewarded(p_s, p_t, supports[method.support], method)
    none = ~both.any(-1, keepdim=True)  # one token of probability 1 on both sides
    both = both | (none & top_k_mask(p_s, 1))
    inside = {
        "teacher_top_k": teacher,
        "student_top_k": student,
        "union_top_k": teacher | student,
        "intersection_top_k": both,
    }[method.support]
    q_s, q_t = (reduced(p, inside, method.tail) for p in (p_s, p_t))
    return entries_of(q_s, bounded(q_s, q_t, method), method)


def rewarded(p_s: torch.Tensor, p_t: torch.Tensor, inside: torch.Tensor, method: Any) -> torch.Tensor:
    """Of each token of a support minus its reward, as data, times the ratio of its probability to what it is."""
    p_t = bounded(p_s, p_t, method)
    weights = {"student_rewards": p_s, "teacher_rewards": p_t}.get(method.divergence, torch.ones_like(p_s)) * inside
    if method.divergence != "even_rewards":
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    costs = (weights * log_ratio(p_s, p_t)).detach()
    return costs * p_s / p_s.detach()


def bounded(p_s: torch.Tensor, p_t: torch.Tensor, method: Any) -> torch.Tensor:
    """The teacher's probabilities, within a range of multiples of the student's: they, or the multiples, are data."""
    low, high = method.ratio_low or 0.0, 1e300 if method.ratio_high is None else method.ratio_high
    within = torch.minimum(torch.maximum(p_t, low * p_s), torch.where(p_s > 0, high * p_s, torch.inf))
    return within.detach() if method.bounded == "teacher" else torch.where(within == p_t, p_t.detach(), within)


def entries_of(p_s: torch.Tensor, p_t: torch.Tensor, method: Any) -> torch.Tensor:
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(method.divergence, method.jsd_weight)
    if beta == 0.0:
        return p_t * log_ratio(p_t, p_s)
    if beta == 1.0:
        return p_s * log_ratio(p_s, p_t)
    m = beta * p_t + (1 - beta) * p_s
    return beta * p_t * log_ratio(p_t, m) + (1 - beta) * p_s * log_ratio(p_s, m)


def log_ratio(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """log p/q, 0 where p is 0."""
    return torch.where(p > 0, p, 1.0).log() - torch.where(p > 0, q, 1.0).log()


def top_k_mask(p: torch.Tensor, k: int) -> torch.Tensor:
    top = p.detach().topk(min(k, p.size(1))).indices
    return torch.zeros_like(p, dtype=torch.bool).scatter(1, top, True)


def reduced(p: torch.Tensor, inside: torch.Tensor, tail: str) -> torch.Tensor:
    if tail == "renormalize":
        return p * inside / (p * inside).sum(-1, keepdim=True)
    return torch.cat([p * inside, (p * ~inside).sum(-1, keepdim=True)], dim=-1)


def sampled_token_coefficients(p_s: torch.Tensor, p_t: torch.Tensor, method: Any) -> torch.Tensor:
    """What ∇ log p_S(y) is multiplied by: each averages to a multiple of ∇D, as Σ_v p_S,v ∇ log p_S,v = 0."""
    if method.divergence == "forward_kl":
        return 1 - p_t / p_s
    if method.divergence == "reverse_kl":
        return torch.log(p_s / p_t)
    beta = method.jsd_weight
    return (1 - beta) * torch.log(p_s / (beta * p_t + (1 - beta) * p_s))
