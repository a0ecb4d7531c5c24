"""Precision, memory and the backward pass, for every support."""

import math
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from objective.plain import CELLS, DIVERGENCES, EXACT, NEVER_EMPTY, SUPPORTS, assert_close, make_case, make_objective
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from trl_opsd.objective import Head, Objective
from trl_opsd.objective.kernel import STATISTICS, divergence_kernel, softmax
from trl_opsd.objective.memory import empty_block, reuse_freed_memory


SMALL = [("forward_kl", 0.5, "full", "bucket"), ("jsd", 0.3, "union_top_k", "bucket")]


def test_statistics_are_those_that_are_returned():
    output = make_case().fused(Objective())

    assert output._fields == ("loss", *STATISTICS, "top_k_overlap", "top_k_mass", "listed_tokens", "listed_log_probs")


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("cell", NEVER_EMPTY, ids=str)
def test_where_the_gradient_is_written(cell, needs_grad, separate):
    products = [torch.randn(4, 9, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    student, teacher = (tensor.clone() for tensor in products)
    finish = Head(torch.zeros(9, 1), scale=1.5).finish
    valid = torch.tensor([True, True, False, True])
    grad = torch.full((4, 9), 7.0, dtype=torch.bfloat16) if separate else None

    divergence_kernel(
        student,
        teacher,
        finish,
        finish,
        torch.arange(4),
        torch.ones(4),
        None,
        valid,
        make_objective(cell),
        needs_grad,
        grad,
    )

    written = needs_grad and not separate
    assert torch.equal(teacher, products[1])
    assert torch.equal(student, products[0]) == (not written)
    if needs_grad:
        found = grad if separate else student
        assert (found[valid].count_nonzero(dim=1) > 1).all()
        assert found[2].count_nonzero() == 0
        tolerance = 1e-2 if separate else 1e-6  # of a softmax's gradient the sum is 0
        assert found.float().sum(dim=1).abs().max() < tolerance * found.abs().sum()
    elif separate:
        assert (grad == 7.0).all()


def test_a_sampled_token_whose_gradient_half_precision_cannot_hold_is_left_out():
    student = torch.tensor([[16.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    teacher = torch.tensor([[0.0, 16.0, 1.0], [0.0, 1.0, 1.0]])
    finish, grad = Head(torch.zeros(3, 1)).finish, torch.empty(2, 3, dtype=torch.float16)
    objective = Objective("forward_kl", support="sampled_token")

    statistics = divergence_kernel(
        student, teacher, finish, finish, torch.tensor([1, 1]), torch.ones(2), None, torch.tensor([True, True]),
        objective, True, grad,
    )  # fmt: skip

    assert statistics[STATISTICS.index("finite")].tolist() == [0.0, 1.0]
    assert grad[0].tolist() == [0.0, 0.0, 0.0]
    assert grad[1].isfinite().all()
    assert grad[1].count_nonzero() == 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_softmax(temperature):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 30
    logits[:, 3] = -math.inf

    found = softmax(logits, temperature)

    log_p = (logits.double() / temperature).log_softmax(-1)
    entropy = torch.distributions.Categorical(logits=log_p.clamp(min=-1e300)).entropy()
    for value, expected in zip(found, (log_p, log_p.exp(), entropy), strict=True):
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-6)


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (700, 1000)])
def test_empty_blocks_are_separate_tensors_of_their_own(shape, dtype, device):
    blocks = [empty_block(*shape, dtype, device).fill_(number) for number in range(3)]

    for number, block in enumerate(blocks):
        assert block.shape == shape
        assert block.dtype == dtype
        assert block.is_contiguous()
        assert (block == number).all()


@pytest.mark.cpu("huge pages")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="The system has no huge pages")
def test_empty_blocks_ask_for_huge_pages():
    block = empty_block(1024, 4096, torch.float32, torch.device("cpu"))

    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]
    ranges = [[int(end, 16) for end in text.split(" ", 1)[0].split("-")] for text in mappings]
    (mine,) = [text for text, (start, end) in zip(mappings, ranges, strict=True) if start <= block.data_ptr() < end]
    assert " hg" in mine[mine.index("VmFlags:") :]


@pytest.mark.cpu("huge pages")
def test_empty_blocks_where_huge_pages_are_refused(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)  # no such advice: an OSError, as without support

    assert (empty_block(3, 4, torch.float32, torch.device("cpu")).fill_(2.0) == 2.0).all()


class Largest(TorchDispatchMode):
    def __enter__(self):
        self.bytes = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.bytes = max([self.bytes, *(tensor.nbytes for tensor in tensors)])
        return result


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell[0] == "jsd"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_rows_never_exist(cell, dtype):
    rows, vocabulary = 32, 301
    case = make_case(rows=rows, vocabulary=vocabulary, bias=True, softcap=3.0, dtype=dtype)
    budget = 8.1 * 8 * vocabulary * 8 / 7 / 2**20  # two fp32 blocks of eight rows
    reuse_freed_memory()  # it allocates, once in a process

    with Largest() as largest:
        case.gradients(case.fused(make_objective(cell, clip=0.05), budget).loss)

    assert 8 * vocabulary <= largest.bytes / 4 <= 8 * vocabulary + rows


MEASURE = """
from pathlib import Path

import torch
from torch.nn import Parameter
from trl_opsd.objective import Head, Objective, fused_divergence

def high_water():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024

def run(divergence, support, rows, budget):
    torch.manual_seed(0)
    hidden = [torch.randn(rows, 16) for _ in range(2)]
    head = Head(Parameter(torch.randn(32768, 16)))
    tokens, weights = torch.randint(32768, (rows,)), torch.ones(rows)
    leaf = hidden[0].requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    objective = Objective(divergence, support=support)
    inputs = (leaf, hidden[1], head, head, tokens, weights)
    fused_divergence(*inputs, objective, memory_budget=budget, kernel="eager").loss.backward()
    return high_water() - before

run("jsd", "full", 8, 4)  # what is loaded when first used
for divergence, support in (("jsd", "full"), ("reverse_kl", "union_top_k")):
    print(run(divergence, support, 128, 16))
print(run("reverse_kl", "union_top_k", 256, 16))
"""


@pytest.mark.cpu("reads the high-water mark of the process")
@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark from /proc")
def test_memory_stays_within_the_budget_whatever_the_number_of_rows():
    # 128 rows of fp32 logits are 16 MiB, 256 are 32 MiB; the gradient of the head is 2 MiB, and all else is smaller
    result = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert result.returncode == 0, result.stderr
    full, union, union_of_many = map(float, result.stdout.split())

    budget, gradients, slack = 16, 2, 3
    assert full < budget + gradients + slack
    assert union < budget + gradients + slack
    assert union_of_many < union + slack
    assert union > budget / 2


# Backward


@pytest.mark.parametrize("cell", SMALL, ids=str)
def test_backward_again_over_a_kept_graph(cell):
    case, objective = make_case(bias=True), make_objective(cell)
    expected = case.gradients(case.fused(objective).loss)

    loss = case.fused(objective).loss
    for factor in (1.0, -2.5, 0.0, 3.0):
        assert_close(
            torch.autograd.grad(factor * loss, case.leaves, retain_graph=True), [factor * grad for grad in expected]
        )
    assert_close(torch.autograd.grad(loss, case.leaves), expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, case.leaves)


@pytest.mark.parametrize("cell", SMALL, ids=str)
def test_losses_accumulate_in_one_gradient(cell):
    first, objective = make_case(bias=True), make_objective(cell)
    second = first.replace(weights=first.weights.flip(0) * 100, token_ids=first.token_ids.flip(0))
    expected = [
        0.5 * a - 3 * b
        for a, b in zip(*(each.gradients(each.fused(objective).loss) for each in (first, second)), strict=True)
    ]

    (0.5 * first.fused(objective).loss).backward()
    kept = [leaf.grad for leaf in first.leaves]
    (-3 * second.fused(objective).loss).backward()

    assert_close([leaf.grad for leaf in first.leaves], expected)
    assert all(leaf.grad is grad for leaf, grad in zip(first.leaves, kept, strict=True))


def test_two_losses_in_one_graph():
    case, objective = make_case(bias=True), make_objective(SMALL[0])
    losses = [case.fused(objective).loss, case.replace(weights=case.weights * 7).fused(objective).loss]

    assert_close(
        case.gradients(losses[0] + losses[1]), [8 * grad for grad in case.gradients(case.fused(objective).loss)]
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_gradient_is_proportional_to_the_weights(scale):
    case, objective = make_case(), make_objective(SMALL[1])
    expected = [scale * grad for grad in case.gradients(case.fused(objective).loss)]
    case.weights = case.weights * scale

    for found, gradient in zip(case.gradients(case.fused(objective).loss), expected, strict=True):
        torch.testing.assert_close(found / scale, gradient / scale, **EXACT)


# Half precision


def trl_loss(case, objective):
    """TRL's divergence from hidden states, in bf16 and with fp32 sums as ours."""
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(objective.divergence, objective.jsd_weight)
    heads = (case.student_head, case.teacher_head)
    divergence, _ = ChunkedDivergenceFunction.apply(
        case.student_hidden, heads[0].weight, heads[0].bias, case.teacher_hidden, heads[1].weight, heads[1].bias, beta
    )
    return (divergence * case.weights).sum()


def half_precision_case(rows, size, vocabulary, distance, dtype=torch.bfloat16, seed=0):
    """A trained head of plausible logits, and a teacher some distance from the student."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, std=1.0):
        return (std * torch.randn(*shape, generator=generator)).to(dtype)

    student = draw(rows, size)
    teacher = student + draw(rows, size, std=distance)
    head = Head(draw(vocabulary, size, std=2 / math.sqrt(size)).requires_grad_())
    case = make_case(rows=rows, vocabulary=vocabulary)
    return case.replace(
        student_hidden=student.requires_grad_(),
        teacher_hidden=teacher.detach(),
        student_head=head,
        teacher_head=Head(head.weight.detach()),
        weights=torch.rand(rows, generator=generator) / rows,
    )


def in_fp64(case):
    head = Head(case.student_head.weight.detach().double().requires_grad_())
    return case.replace(
        student_hidden=case.student_hidden.detach().double().requires_grad_(),
        teacher_hidden=case.teacher_hidden.double(),
        student_head=head,
        teacher_head=Head(head.weight.detach()),
        weights=case.weights.double(),
    )


def relative_errors(found, expected):
    return torch.tensor([(a.double() - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)])


@pytest.mark.parametrize(("divergence", "weight"), DIVERGENCES)
@pytest.mark.parametrize(("rows", "size", "vocabulary"), [(64, 32, 500), (33, 128, 1001)])
def test_bf16_gradient_is_as_exact_as_that_of_trl(divergence, weight, rows, size, vocabulary):
    objective, squares = Objective(divergence, weight), []
    for seed in range(15):  # one case's rounding is a matter of luck
        case = half_precision_case(rows, size, vocabulary, distance=(1.0, 0.1, 0.01)[seed % 3], seed=seed)
        reference = in_fp64(case)
        exact = reference.fused(objective)
        expected = reference.gradients(exact.loss)
        output = case.fused(objective)
        errors = [relative_errors(case.gradients(loss), expected) for loss in (output.loss, trl_loss(case, objective))]
        squares.append(torch.stack(errors) ** 2)
        assert abs(output.loss - exact.loss) < 2e-7  # fp32 rounds log-probabilities of 10 to 5e-7 at most
        assert errors[0].max() < 4e-3  # bf16 rounds by 2⁻⁹ at most, here twice

    ours, theirs = torch.stack(squares).mean(0).sqrt()
    assert (ours <= 1.05 * theirs).all()


@pytest.mark.parametrize(("support", "tail"), SUPPORTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradient_of_every_support(support, tail, dtype):
    case = half_precision_case(64, 32, 500, 0.3, dtype)
    objective = Objective("reverse_kl", support=support, tail=tail)
    reference = in_fp64(case)
    expected = reference.gradients(reference.fused(objective).loss)

    for error in relative_errors(case.gradients(case.fused(objective).loss), expected):
        assert error < (4e-3 if dtype == torch.bfloat16 else 6e-4)
