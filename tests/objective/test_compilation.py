import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from objective.plain import assert_close, make_case, make_objective

from trl_opsd.objective import Objective, kernels
from trl_opsd.objective.compilation import Compiled


pytestmark = pytest.mark.cpu("the compiled kernel")

# A kernel each: of the full vocabulary, and of a support with its gathers, scatters and mask
COMPILED = [("jsd", 0.3, "full", "bucket"), ("forward_kl", 0.5, "union_top_k", "bucket")]


@pytest.fixture
def fresh_kernel():
    """A kernel that was neither compiled nor given up yet, and none left behind."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    kernels.compiled_kernel.cache_clear()
    yield
    kernels.compiled_kernel.cache_clear()
    torch.compiler.reset()


@pytest.mark.parametrize("cell", COMPILED, ids=str)
def test_compiled_equals_eager(cell, fresh_kernel):
    # Slices of eight rows, 56 of them to a block: less than a slice, and a last slice or block that is not full
    objective = make_objective(cell, clip=0.03, temperature=0.8)
    options = {"memory_budget": 8 * 64 * 2 * 4 * 300 / 2**20 * 1.01}
    for rows in (1, 5, 24, 500):
        case = make_case(rows, 300, 8, bias=True, scale=1.2, softcap=6.0, dtype=torch.float32, seed=rows, std=0.5)
        eager = case.fused(objective, **options)
        expected = case.gradients(eager.loss)

        with warnings.catch_warnings(action="error", category=UserWarning):
            output = case.fused(objective, **options, kernel="compiled")

        assert_close(output, eager, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert_close(case.gradients(output.loss), expected, rtol=1e-4, atol=1e-6)
        assert output.clipped.any()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def counted(function):
    """The calls of a function, while dynamo only traces it."""
    calls = []

    def wrapped(x):
        if not torch.compiler.is_compiling():
            calls.append(x)
        return function(x)

    return wrapped, calls


def double_and_break(x):
    torch._dynamo.graph_break()
    return 2 * x


def test_what_cannot_be_compiled_runs_as_it_is_after_one_warning():
    function, calls = counted(double_and_break)
    compiled = Compiled(function)

    with pytest.warns(
        UserWarning, match=r"^torch.compile failed \(\w+: .+\)\. The divergence runs uncompiled"
    ) as seen:
        results = [compiled(torch.tensor([value])).item() for value in (1.0, 2.0, 3.0)]

    assert results == [2.0, 4.0, 6.0]
    assert len(seen) == 1
    assert seen[0].message.args[0].count("\n") == 0
    assert len(calls) == 3


def test_backend_that_fails_leaves_the_right_result(fresh_kernel, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    case, objective = make_case(bias=True), Objective("jsd", clip=0.05)
    expected = case.fused(objective)
    gradients = case.gradients(expected.loss)

    with pytest.warns(UserWarning, match="torch.compile failed.*no compiler here") as seen:
        outputs = [case.fused(objective, kernel="compiled") for _ in range(2)]

    assert len([warning for warning in seen if "torch.compile failed" in str(warning.message)]) == 1
    for output in outputs:
        assert_close(output, expected)
        assert_close(case.gradients(output.loss), gradients)


def test_own_errors_are_not_taken_for_failures_to_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def fail(x):
        raise IndexError("index out of range")

    with warnings.catch_warnings(action="error"), pytest.raises(IndexError, match="out of range"):
        Compiled(fail)(torch.zeros(1))


NO_COMPILER = """
import warnings
import torch
from trl_opsd.objective.compilation import Compiled

def function(x):
    return (x.sin() + 1).cumsum(0)

x = torch.arange(6.0)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    compiled = Compiled(function)
    results = [compiled(x), compiled(x + 1)]
assert torch.equal(results[0], function(x)) and torch.equal(results[1], function(x + 1))
print([str(warning.message) for warning in seen if "torch.compile failed" in str(warning.message)])
"""


@pytest.mark.slow
def test_machine_without_a_compiler(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", NO_COMPILER],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout.count("torch.compile failed") == 1
    assert "Install a C++ compiler" in result.stdout


def test_more_cases_than_torch_compiles_run_uncompiled_and_the_others_stay_compiled(fresh_kernel, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    case, objectives = make_case(), [Objective(clip=clip) for clip in (0.01, 0.02, 0.03, 0.04)]

    with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UserWarning)
        for objective in (*objectives, objectives[0]):
            assert_close(case.fused(objective, kernel="compiled"), case.fused(objective))

    ours = [str(one.message) for one in seen if one.category is UserWarning]  # torch warns of some releases of Python
    assert ["recompile_limit" in message for message in ours] == [True]
    assert not kernels.compiled_kernel()._failed


def test_the_number_of_rows_is_no_reason_to_compile_anew(fresh_kernel, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for rows in range(1, 400, 10):
        make_case(rows, vocabulary=2**13, size=2, dtype=torch.float32).fused(Objective(), kernel="compiled")

    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("vocabulary", "kernel", "compiled"),
    [(8191, None, False), (8192, None, True), (8192, "eager", False), (5, "compiled", True), (5, None, False)],
)
def test_when_the_kernel_is_compiled(vocabulary, kernel, compiled, monkeypatch):
    used = []

    def compiled_kernel():
        used.append(True)
        return kernels.divergence_kernel

    monkeypatch.setattr(kernels, "compiled_kernel", compiled_kernel)

    make_case(rows=1, vocabulary=vocabulary, size=1).fused(Objective(), kernel=kernel)

    assert bool(used) == compiled


def test_kernel_is_compiled_once_for_all_calls():
    assert kernels.compiled_kernel() is kernels.compiled_kernel()
