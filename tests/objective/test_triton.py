"""The Triton kernels under Triton's interpreter, and compiled for GPUs that are not here."""

import dataclasses
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective.plain import BOUNDED, CELLS, NEVER_EMPTY, REWARDED, assert_close, make_case, make_objective, plain_loss

from trl_opsd.objective import Head, Objective, default_kernel, kernels, token_log_probs


pytest.importorskip("triton")

from trl_opsd.objective import triton_kernel
from trl_opsd.objective.kernel import STATISTICS, divergence_kernel


# Sums of a few hundred numbers in fp32
VALUES = {"rtol": 2e-5, "atol": 1e-5}
GRADIENTS = {"rtol": 1e-4, "atol": 5e-5}


def in_fp32(case):
    """The same numbers in fp32, and those that they were rounded to in fp64."""

    def cast(head, dtype, trained):
        tensors = (
            None if tensor is None else tensor.detach().float().to(dtype) for tensor in (head.weight, head.bias)
        )
        weight, bias = (None if tensor is None else tensor.requires_grad_(trained) for tensor in tensors)
        return dataclasses.replace(head, weight=weight, bias=bias)

    def whole(dtype):
        likelihood = case.likelihood_weights
        return case.replace(
            student_hidden=case.student_hidden.detach().float().to(dtype).requires_grad_(),
            teacher_hidden=case.teacher_hidden.detach().float().to(dtype),
            student_head=cast(case.student_head, dtype, True),
            teacher_head=cast(case.teacher_head, dtype, False),
            weights=case.weights.float().to(dtype),
            likelihood_weights=None if likelihood is None else likelihood.float().to(dtype),
        )

    return whole(torch.float32), whole(torch.float64)


def assert_equals_plain(case, objective, **options):
    found, exact = in_fp32(case)
    output = found.fused(objective, kernel="triton", **options)
    loss, values = plain_loss(exact, objective)

    torch.testing.assert_close(output.loss.double(), loss.detach(), **VALUES)
    for name, value in values.items():
        torch.testing.assert_close(getattr(output, name).double(), value, **VALUES, msg=lambda m, name=name: name + m)
    for gradient, expected in zip(found.gradients(output.loss), exact.gradients(loss), strict=True):
        torch.testing.assert_close(gradient.double(), expected, **GRADIENTS)
    return output


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("clip", [None, 0.03])
@pytest.mark.parametrize("likelihood", [False, True])
def test_every_cell_equals_the_plain_formula(cell, clip, likelihood):
    capped = make_case(rows=3, bias=True, scale=1.7, softcap=2.5, seed=2)
    capped.teacher_head = dataclasses.replace(capped.teacher_head, scale=0.6, softcap=None)
    for case, temperature, budget in (
        (make_case(rows=3), 1.0, None),
        (make_case(rows=3, bias=True, vocabulary=1000, seed=1), 0.7, 0.05),  # searched in chunks, in several blocks
        (capped, 1.6, 1e-6),
    ):
        if likelihood:
            case.likelihood_weights = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)
        objective = make_objective(cell, clip=clip, temperature=temperature)
        output = assert_equals_plain(case, objective, memory_budget=budget)

        assert output.clipped.any().item() == (clip is not None) or cell not in NEVER_EMPTY


@pytest.mark.parametrize("cell", REWARDED, ids=str)
def test_rewards_equal_the_plain_formula(cell):
    case = make_case(rows=3, bias=True, vocabulary=70, seed=3)
    case.likelihood_weights = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)
    for bounds in ({}, {"ratio_low": 0.8, "ratio_high": 1.2}):
        assert_equals_plain(case, make_objective(cell, temperature=0.9, **bounds))


@pytest.mark.parametrize(("cell", "data"), BOUNDED, ids=str)
@pytest.mark.parametrize(("low", "high"), [(0.8, 1.2), (0.8, None), (None, 1.2)])
@pytest.mark.parametrize("clip", [None, 0.03])
def test_ratios_within_bounds_equal_the_plain_formula(cell, data, low, high, clip):
    case = make_case(rows=3, bias=True, vocabulary=70, seed=3)
    assert_equals_plain(
        case, make_objective(cell, clip=clip, ratio_low=low, ratio_high=high, bounded=data, temperature=0.9)
    )


@settings(max_examples=60)
@given(
    data=st.data(),
    cell=st.sampled_from(CELLS),
    rows=st.integers(0, 3),
    vocabulary=st.sampled_from([1, 2, 63, 64, 65, 130, 300, 2049]),
    temperature=st.sampled_from([0.05, 0.5, 1.0, 3.0, 100.0]),
    clip=st.none() | st.floats(1e-4, 1.0),
    head=st.sampled_from([(1.0, None), (1.3, None), (0.5, 3.0)]),
    bias=st.booleans(),
    likelihood=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_torch_kernel_whatever_the_shape(
    data, cell, rows, vocabulary, temperature, clip, head, bias, likelihood, seed
):
    top_k = data.draw(st.sampled_from([2, 5, vocabulary, vocabulary + 3]).filter(lambda k: k > 1))
    weights = data.draw(st.lists(st.sampled_from([0.0, 1.0]) | st.floats(-3, 3), min_size=rows, max_size=rows))
    case = make_case(rows, vocabulary, 4, bias, False, *head, dtype=torch.float32, seed=seed)
    case.weights = torch.tensor(weights, dtype=torch.float32)
    if likelihood:
        case.likelihood_weights = case.weights.flip(0)
    objective = make_objective(cell, top_k, clip=clip, temperature=temperature)

    output, expected = (case.fused(objective, kernel=kernel) for kernel in ("triton", "eager"))

    tolerance = {"rtol": 1e-4, "atol": 1e-4 / temperature}  # of logits divided by it
    assert torch.equal(output.finite, expected.finite)
    if clip is None:
        assert_close(output, expected, **tolerance)
    else:  # an entry may lie at the clip
        assert_close([output.divergence], [expected.divergence], **tolerance)
    if rows and clip is None:
        for found, wanted in zip(case.gradients(output.loss), case.gradients(expected.loss), strict=True):
            assert (found - wanted).norm() <= 1e-3 * wanted.norm() + 1e-4 / temperature


@pytest.mark.parametrize("support", ["full", "teacher_top_k", "sampled_token"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rows_that_are_not_finite_are_left_out(support, bad, side):
    case = make_case(rows=4, dtype=torch.float32, bias=True)
    hidden = {"student": case.student_hidden.detach().clone(), "teacher": case.teacher_hidden.clone()}
    hidden[side][1] = bad
    case = case.replace(student_hidden=hidden["student"].requires_grad_(), teacher_hidden=hidden["teacher"])
    case.likelihood_weights = torch.ones(4)
    objective = Objective("jsd", support=support, top_k=3)

    output, expected = (case.fused(objective, kernel=kernel) for kernel in ("triton", "eager"))

    assert output.finite.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert_close([output.loss, output.divergence], [expected.loss, expected.divergence], **VALUES)
    assert_close(case.gradients(output.loss), case.gradients(expected.loss), **GRADIENTS)
    assert case.gradients(case.fused(objective, kernel="triton").loss)[0][1].count_nonzero() == 0


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_impossible_tokens(cell, side):
    def blocked(head):
        bias = head.bias.detach().clone()
        bias[2] = -math.inf
        return dataclasses.replace(head, bias=bias)

    case = make_case(rows=4, dtype=torch.float32, bias=True)
    case.token_ids = torch.tensor([0, 1, 3, 2])  # the last one is impossible itself
    if side != "teacher":
        case.student_head = blocked(case.student_head)
    if side != "student":
        case.teacher_head = blocked(case.teacher_head)
    objective = make_objective(cell, top_k=4)

    output, expected = (case.fused(objective, kernel=kernel) for kernel in ("triton", "eager"))

    assert torch.equal(output.finite, expected.finite)
    assert_close([output.loss, output.divergence], [expected.loss, expected.divergence], **VALUES)
    kept = case.token_ids != 2
    assert_close([output.student_entropy[kept]], [expected.student_entropy[kept]], **VALUES)
    assert_close(case.gradients(output.loss), case.gradients(expected.loss), **GRADIENTS)


def test_an_impossible_token_has_no_likelihood():
    case = make_case(rows=2, dtype=torch.float32, bias=True)
    bias = case.student_head.bias.detach().clone()
    bias[2] = -math.inf
    case.student_head = dataclasses.replace(case.student_head, bias=bias.requires_grad_())
    case.teacher_head = dataclasses.replace(case.teacher_head, bias=bias.detach())
    case.token_ids, case.likelihood_weights = torch.tensor([2, 2]), torch.tensor([1.0, 0.0])

    for kernel in ("triton", "eager"):
        output = case.fused(Objective(), kernel=kernel)
        assert output.finite.tolist() == [0.0, 1.0]
        assert output.loss.isfinite()


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [300, 5000])
def test_half_precision_gradients_are_written_over_the_logits(cell, dtype, vocabulary):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, vocabulary, generator=generator) for _ in range(2))
    finish, valid = Head(torch.zeros(vocabulary, 1), scale=1.2, softcap=4.0).finish, torch.tensor([True, True, False])
    factors = torch.tensor([1.0, -2.0, 1.0])

    def run(kernel, grad_of):
        products = [student.clone(), teacher.clone()]
        grad = grad_of(products[0])
        statistics = kernel(
            *products, finish, finish, torch.arange(3), factors, factors, valid, make_objective(cell), True, grad
        )
        return statistics, grad

    statistics, grad = run(triton_kernel.triton_divergence_kernel, lambda logits: logits.view(dtype)[:, :vocabulary])
    expected, expected_grad = run(divergence_kernel, torch.empty_like)

    assert_close([statistics[0]], [expected[0]], **VALUES)
    assert expected_grad[:2].count_nonzero() > vocabulary
    difference = (grad.float() - expected_grad).norm()
    # The interpreter cuts bf16 off where a GPU rounds
    assert difference < {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype] * expected_grad.norm()
    assert grad[2].count_nonzero() == 0


def test_a_ratio_that_half_precision_cannot_hold_is_left_out():
    student = torch.tensor([[16.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    teacher = torch.tensor([[0.0, 16.0, 1.0], [0.0, 1.0, 1.0]])
    finish, grad = Head(torch.zeros(3, 1)).finish, torch.empty(2, 3, dtype=torch.float16)

    statistics = triton_kernel.triton_divergence_kernel(
        student, teacher, finish, finish, torch.tensor([1, 1]), torch.ones(2), None, torch.tensor([True, True]),
        Objective("forward_kl", support="sampled_token"), True, grad,
    )  # fmt: skip

    assert statistics[STATISTICS.index("finite")].tolist() == [0.0, 1.0]
    assert grad[0].tolist() == [0.0, 0.0, 0.0]
    assert grad[1].count_nonzero() == 3


def test_no_rows():
    output = make_case(rows=0, dtype=torch.float32).fused(Objective(), kernel="triton")

    assert output.loss.item() == 0.0
    assert [value.shape for value in output[1:]] == [*[(0,)] * 10, (0, 2, 0), (0, 2, 0)]


def test_without_a_gradient_nothing_is_written():
    case, objective = make_case(dtype=torch.float32), Objective("jsd", clip=0.1)
    expected = case.fused(objective, kernel="triton")

    with torch.no_grad():
        output = case.fused(objective, kernel="triton")

    assert not output.loss.requires_grad
    assert_close(output, [value.detach() for value in expected], rtol=0.0, atol=0.0)


def test_teacher_equal_to_student():
    case = make_case(rows=5, vocabulary=3000, tied=True, bias=True, dtype=torch.float32)
    case.teacher_hidden = case.student_hidden.detach().clone()
    for divergence, most in (("forward_kl", 0.0), ("reverse_kl", 0.0), ("jsd", 1e-6)):
        output = case.fused(Objective(divergence), kernel="triton")
        assert output.divergence.abs().max() <= most
        assert all(gradient.abs().max() < 1e-5 for gradient in case.gradients(output.loss))


@pytest.mark.parametrize(("factor", "dtype"), [(1.0, torch.float32), (-2.5, torch.float32), (0.3, torch.bfloat16)])
def test_scale(factor, dtype):
    tensor = torch.randn(3, 1001)
    out = tensor.clone() if dtype == torch.float32 else torch.empty_like(tensor, dtype=dtype)

    found = triton_kernel.scale(out if dtype == torch.float32 else tensor, torch.tensor(factor), out)

    assert found is out
    tolerance = {"rtol": 2**-7, "atol": 0.0} if dtype == torch.bfloat16 else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(found, (tensor * factor).to(dtype), **tolerance)


@pytest.mark.parametrize("kernel", ["triton", "eager"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_token_log_probs(kernel, temperature, rows):
    case = make_case(rows, vocabulary=500, size=8, bias=True, scale=1.3, softcap=5.0, dtype=torch.float32)
    head = case.student_head
    budget = 3 * 500 * 4 * 8 / 7 / 2**20  # three rows to a block

    log_probs, entropies = token_log_probs(case.student_hidden, head, case.token_ids, temperature, budget, kernel)

    logits = head.finish.logits(case.student_hidden @ head.weight.t()).double().detach() / temperature
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(log_probs.double(), expected.gather(1, case.token_ids[:, None])[:, 0], **VALUES)
    torch.testing.assert_close(entropies.double(), -(expected.exp() * expected).sum(-1), **VALUES)
    assert not log_probs.requires_grad


# Choice


@pytest.fixture
def fresh_choice():
    kernels._triton_works.cache_clear()
    yield
    kernels._triton_works.cache_clear()


GPU = torch.device("cuda")


def test_a_gpu_gets_triton_in_fp32_alone(fresh_choice, monkeypatch):
    monkeypatch.setattr(triton_kernel, "smoke_test", lambda device: None)

    assert default_kernel(GPU, 100) == "triton"
    assert default_kernel(GPU, 100, torch.float64) == "eager"
    assert default_kernel(torch.device("cpu"), 100) == "eager"


def test_triton_that_is_missing_or_fails_is_said_once(fresh_choice, monkeypatch):
    def fail(device):
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(triton_kernel, "smoke_test", fail)
    with pytest.warns(UserWarning, match=r"Triton failed \(RuntimeError: no C compiler\)\. The divergence") as seen:
        assert [default_kernel(GPU, 100) for _ in range(3)] == ["eager"] * 3
    assert len(seen) == 1

    kernels._triton_works.cache_clear()
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert default_kernel(GPU, 100) == "eager"


def test_the_smoke_test_runs_the_kernels(device):
    with warnings.catch_warnings(action="ignore"):
        triton_kernel.smoke_test(device)


@pytest.mark.parametrize(
    ("kernel", "dtype", "message"),
    [
        ("triton", torch.float64, "`kernel='triton'` computes in fp32, and the inputs are torch.float64"),
        ("cuda", torch.float32, r"`kernel` must be one of \['triton', 'compiled', 'eager'\], got 'cuda'"),
    ],
)
def test_kernels_that_cannot_run(kernel, dtype, message):
    with pytest.raises(ValueError, match=message):
        make_case(dtype=dtype).fused(Objective(), kernel=kernel)


# Compiled for a GPU

COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class NoDevice:
    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


driver.set_active(NoDevice())
from trl_opsd.objective import Head, Objective, fused_divergence, triton_kernel


class CompileOnly:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.kernel.warmup(*args, grid=grid, **kwargs)


names = [name for name in vars(triton_kernel) if name.endswith("_kernel") and name != "triton_divergence_kernel"]
wrapped = {name: CompileOnly(vars(triton_kernel)[name]) for name in names}
vars(triton_kernel).update(wrapped)


def compiled():
    return sum(len(cache[0]) for one in wrapped.values() for cache in one.kernel.device_caches.values())


def run(rows, objective, dtype=torch.bfloat16, likelihood=None, vocabulary=5003, softcap=None):
    hidden = torch.randn(rows, 8, dtype=dtype, requires_grad=True)
    head = Head(torch.randn(vocabulary, 8, dtype=dtype), torch.randn(vocabulary), 1.1, softcap)
    weights = torch.ones(rows)
    tokens = torch.zeros(rows, dtype=torch.int64)
    loss = fused_divergence(
        hidden, hidden.detach(), head, head, tokens, weights, objective,
        weights if likelihood else None, memory_budget=2.0, kernel="triton",
    ).loss
    loss.backward()


supports = ("full", "union_top_k", "sampled_token")
for support in supports:
    run(40, Objective("jsd", support=support))
first = compiled()
for rows in range(1, 400, 10):
    for support in supports:
        run(rows, Objective("jsd", support=support))
print("variants", first, compiled(), len(names))
for divergence in ("forward_kl", "reverse_kl", "jsd"):
    for clip in (None, 0.1):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            run(8, Objective(divergence, clip=clip), dtype, likelihood=True, vocabulary=151936, softcap=30.0)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_gpu_and_never_anew_for_another_number_of_rows(capability, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )

    assert result.returncode == 0, result.stderr
    _, first, after_many, num_kernels = result.stdout.split()
    assert int(first) >= int(num_kernels)
    assert after_many == first
