import math

import pytest
import torch

from trl_opsd.objective.blocks import MIB, Blocks, default_memory


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 7, 8, 9, 100, 1000, 4097])
@pytest.mark.parametrize("row_bytes", [8 * 100, 8 * 32_000, 12 * 151_936])
@pytest.mark.parametrize("budget", [1e-6, 0.5, 64.0, 256.0])
@pytest.mark.parametrize("kernel", ["eager", "compiled"])
def test_blocks_fit_the_budget_and_hold_every_row(num_rows, row_bytes, budget, kernel):
    block_rows, slice_rows = Blocks.fit(num_rows, row_bytes, budget, kernel)
    share = 32 if kernel == "compiled" else 64

    assert block_rows % slice_rows == 0
    if kernel == "compiled":
        assert slice_rows == Blocks.fit(10**6, row_bytes, budget, kernel).slice_rows
    else:
        assert slice_rows <= max(num_rows, 1)
    assert slice_rows == 1 or slice_rows * row_bytes * share <= budget * MIB
    assert block_rows == 1 or block_rows * row_bytes <= 0.875 * budget * MIB
    assert slice_rows >= num_rows or 2 * slice_rows * row_bytes * share > budget * MIB
    # No block more than needed, and none much emptier than the others
    num_blocks = math.ceil(num_rows / block_rows)
    most = max(1, int(0.875 * budget * MIB / row_bytes) // slice_rows) * slice_rows
    assert num_blocks == math.ceil(math.ceil(num_rows / slice_rows) * slice_rows / most)
    assert block_rows - math.ceil(num_rows / max(num_blocks, 1)) < slice_rows or num_rows <= 1


@pytest.mark.parametrize("num_rows", [0, 1, 127, 128, 129, 4096, 65_536, 70_001])
@pytest.mark.parametrize("vocabulary", [101, 49_152, 151_936, 262_144])
@pytest.mark.parametrize("budget", [1.0, 64.0, 1024.0, 1357.0])
def test_blocks_of_a_gpu_fill_the_tiles_of_its_products(num_rows, vocabulary, budget):
    block_rows, slice_rows = Blocks.fit(num_rows, 8 * vocabulary, budget, "triton")
    fitting = int(budget * MIB * 7 / 8 / (8 * vocabulary))

    assert slice_rows == block_rows  # one launch each
    assert 1 <= block_rows <= max(1, num_rows, 1)
    assert block_rows <= max(1, fitting)
    assert block_rows == max(1, num_rows) or fitting < 128 or block_rows % 128 == 0
    if fitting >= 128:
        assert math.ceil(num_rows / block_rows) == math.ceil(num_rows / (fitting // 128 * 128))


HEADS = {  # fp32 gradients of trained heads, in bytes
    "smollm2-135m": 4 * 49_152 * 576,
    "qwen3-1.7b": 4 * 151_936 * 2048,
    "qwen3-8b": 4 * 151_936 * 4096,
}


@pytest.mark.parametrize(
    ("free_gib", "head", "mib"),
    [
        (79.0, None, 1024),
        (79.0, "smollm2-135m", 1024),
        (79.0, "qwen3-1.7b", 1357),
        (79.0, "qwen3-8b", 2713),
        (22.0, None, 1024),
        (22.0, "qwen3-1.7b", 1357),
        (8.0, "qwen3-8b", 1357),
        (3.0, None, 512),
        (1.0, None, 256),
        (0.01, None, 64),
    ],
)
def test_default_memory_of_a_gpu(free_gib, head, mib):
    found = default_memory(torch.device("cuda"), HEADS.get(head, 0), int(free_gib * 2**30))

    assert found == pytest.approx(mib, abs=0.5)


@pytest.mark.parametrize(
    ("vocabulary", "head", "rows"),
    [(151_936, None, 768), (151_936, "qwen3-1.7b", 1024), (151_936, "qwen3-8b", 2048), (49_152, "smollm2-135m", 2304)],
)
def test_rows_of_a_large_gpu(vocabulary, head, rows):
    budget = default_memory(torch.device("cuda"), HEADS.get(head, 0), 2**36)

    assert Blocks.fit(10**5 * 128, 8 * vocabulary, budget, "triton").block_rows == rows


def test_default_memory_elsewhere():
    assert default_memory(torch.device("cpu"), HEADS["qwen3-8b"]) == 256.0
