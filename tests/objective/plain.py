"""The fused loss once more, as the papers write it: whole float64 logits, plain probabilities, autograd."""

import dataclasses
import itertools

import torch
from plain_loop import divergence_entries, top_k_mask

from trl_opsd.objective import Head, Objective, fused_divergence


DIVERGENCES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.3)]
TOP_K = ("teacher_top_k", "student_top_k", "union_top_k")
SUPPORTS = [
    ("full", "bucket"),
    *itertools.product(TOP_K, ("bucket", "renormalize")),
    ("intersection_top_k", "renormalize"),
    ("sampled_token", "bucket"),
]
CELLS = [
    (divergence, weight, support, tail)
    for (divergence, weight), (support, tail) in itertools.product(DIVERGENCES, SUPPORTS)
]
# With what is data where a ratio is out of bounds
BOUNDED = [
    (cell, data)
    for cell, data in itertools.product(CELLS, ("teacher", "ratio"))
    if data == "teacher" or cell[2] != "sampled_token"
]
# Policy gradients over a support
REWARDED = [
    (f"{weights}_rewards", 0.5, support, "bucket")
    for weights, support in itertools.product(("student", "teacher", "even"), TOP_K)
]
# Of supports that have more than one token, whatever the two distributions are
NEVER_EMPTY = [cell for cell in CELLS if cell[2] != "intersection_top_k"]
EXACT = {"rtol": 1e-9, "atol": 1e-12}


@dataclasses.dataclass
class Case:
    """What the loss reads. The student's tensors are leaves."""

    student_hidden: torch.Tensor
    teacher_hidden: torch.Tensor
    student_head: Head
    teacher_head: Head
    token_ids: torch.Tensor
    weights: torch.Tensor
    likelihood_weights: torch.Tensor | None = None

    @property
    def leaves(self):
        tensors = (self.student_hidden, self.student_head.weight, self.student_head.bias)
        return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]

    def fused(self, objective, memory_budget=256.0, kernel="eager"):
        tensors = [getattr(self, field.name) for field in dataclasses.fields(self)[:-1]]
        return fused_divergence(*tensors, objective, self.likelihood_weights, memory_budget, kernel)

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def with_student(self, hidden, weight, bias=None):
        head = dataclasses.replace(self.student_head, weight=weight, bias=bias)
        return self.replace(student_hidden=hidden, student_head=head)

    def with_biases(self, student, teacher):
        return self.replace(
            student_head=dataclasses.replace(self.student_head, bias=student),
            teacher_head=dataclasses.replace(self.teacher_head, bias=teacher),
        )

    def gradients(self, loss):
        return torch.autograd.grad(loss, self.leaves)


def make_case(
    rows=6, vocabulary=9, size=3, bias=False, tied=False, scale=1.0, softcap=None, dtype=torch.float64, seed=0, std=1.0
):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape, std=1.0):
        return (std * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    def head(size):
        return Head(leaf(vocabulary, size, std=std), leaf(vocabulary) if bias else None, scale, softcap)

    student_head = head(size)
    return Case(
        student_hidden=leaf(rows, size),
        teacher_hidden=leaf(rows, size if tied else size + 2).detach(),
        student_head=student_head,
        teacher_head=student_head if tied else head(size + 2),
        token_ids=torch.randint(vocabulary, (rows,), generator=generator),
        weights=torch.randn(rows, generator=generator, dtype=torch.float64),
    )


def make_objective(cell, top_k=3, **options):
    divergence, weight, support, tail = cell
    return Objective(divergence, weight, support=support, tail=tail, top_k=top_k, **options)


def probabilities(hidden, head, temperature):
    logits = torch.einsum("nh,vh->nv", hidden, head.weight)
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.softmax(logits / temperature, dim=-1)


def plain_entries(case, objective):
    """The entries before the clip, differentiable; and both distributions over the vocabulary."""
    p_s = probabilities(case.student_hidden, case.student_head, objective.temperature)
    p_t = probabilities(case.teacher_hidden, case.teacher_head, objective.temperature).detach()
    return divergence_entries(p_s, p_t, case.token_ids[:, None], objective), p_s, p_t


def plain_loss(case, objective):
    """The loss, differentiable, and what else the fused one returns, by name."""
    entries, p_s, p_t = plain_entries(case, objective)
    clip = torch.inf if objective.clip is None else objective.clip
    clipped = entries.clamp(max=clip)
    teacher, student = top_k_mask(p_t, objective.top_k), top_k_mask(p_s, objective.top_k)
    values = {
        "divergence": clipped.sum(-1),
        "student_entropy": torch.special.entr(p_s).sum(-1),
        "teacher_entropy": torch.special.entr(p_t).sum(-1),
        "student_log_prob": p_s.gather(1, case.token_ids[:, None])[:, 0].log(),
        "teacher_log_prob": p_t.gather(1, case.token_ids[:, None])[:, 0].log(),
        "top_k_overlap": (teacher & student).double().sum(-1) / min(objective.top_k, p_s.size(1)),
        "top_k_mass": (p_s * teacher).sum(-1),
        "clipped": (entries > clip).any(-1),
        "clipped_mass": (entries - clipped).sum(-1),
        "finite": torch.ones(len(p_s)),
    }
    loss = (values["divergence"] * case.weights).sum()
    if case.likelihood_weights is not None:
        loss = loss - (values["student_log_prob"] * case.likelihood_weights).sum()
    return loss, {name: value.detach().to(p_s.dtype) for name, value in values.items()}


def assert_close(actual, expected, **tolerance):
    torch.testing.assert_close(list(actual), list(expected), **(tolerance or EXACT))


def assert_equals_plain(case, objective, **options):
    output = case.fused(objective, **options)
    loss, values = plain_loss(case, objective)

    assert_close([output.loss], [loss])
    torch.testing.assert_close({name: getattr(output, name) for name in values}, values, **EXACT)
    assert_close(case.gradients(output.loss), case.gradients(loss))
    return output
