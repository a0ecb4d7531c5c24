import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_opsd.objective import products
from trl_opsd.objective.products import add_outer, project, project_back


ROWS, SIZE, VOCABULARY = 5, 7, 23
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Dtype of the operands, and of the weight as it is stored
DTYPES = [*[(dtype, dtype) for dtype in FLOATS], (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
# Rows of the vocabulary to a tile: one, one short of and exactly a divisor, all but one, all
TILES = [1, 4, 11, 12, 22, 23, 1000]


@pytest.fixture(params=TILES)
def tile(request, monkeypatch):
    monkeypatch.setattr(products, "TILE_ELEMENTS", request.param * SIZE + SIZE - 1)
    return request.param


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def tensor(*shape, dtype, seed):
    """A tensor whose rows do not lie one behind the other, as a slice of a wider one has them."""
    wider = torch.randn(shape[0], shape[1] + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return wider.to(dtype)[:, 1:-2]


def exact(a, b, dtype):
    """The product of rounded operands, in float64."""
    return a.to(dtype).double() @ b.to(dtype).double()


def assert_close(found, expected):
    tolerance = 1e-13 if found.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=8 * tolerance)


class Products(TorchDispatchMode):
    """The matrix products inside, each with the precision that fp32 ones are allowed."""

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.seen.append((args[0].dtype, torch.backends.mkldnn.matmul.fp32_precision))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "stored"), DTYPES)
def test_project(dtype, stored, tile):
    hidden, weight = tensor(ROWS, SIZE, dtype=dtype, seed=0), tensor(VOCABULARY, SIZE, dtype=stored, seed=1)
    whole = torch.full((ROWS + 2, VOCABULARY + 2), torch.nan, dtype=wide(dtype))
    out = whole[1:-1, 1:-1]

    project(hidden, weight, out, dtype)

    assert_close(out, exact(hidden, weight.t(), dtype))
    assert whole.isnan().sum() == whole.numel() - out.numel()


@pytest.mark.parametrize(("dtype", "stored"), DTYPES)
def test_project_back(dtype, stored, tile):
    grad, weight = tensor(ROWS, VOCABULARY, dtype=wide(dtype), seed=0), tensor(VOCABULARY, SIZE, dtype=stored, seed=1)
    whole = torch.full((ROWS + 2, SIZE), torch.nan, dtype=wide(dtype))
    out = whole[1:-1]

    project_back(grad, weight, out, dtype)

    assert_close(out, exact(grad, weight, dtype))
    assert whole[[0, -1]].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_add_outer(dtype, tile):
    grads = [tensor(ROWS, VOCABULARY, dtype=wide(dtype), seed=seed) for seed in (0, 1)]
    hidden = [tensor(ROWS, SIZE, dtype=dtype, seed=seed) for seed in (2, 3)]
    total = torch.full((VOCABULARY, SIZE), torch.nan, dtype=wide(dtype))

    for index in (0, 1):
        add_outer(grads[index], hidden[index], total, dtype, first=index == 0)

    assert_close(total, sum(exact(grad.t(), rows, dtype) for grad, rows in zip(grads, hidden, strict=True)))


@pytest.mark.parametrize(
    ("dtype", "stored", "one_product"),
    [
        (torch.float32, torch.float32, True),
        (torch.float64, torch.float64, True),
        (torch.bfloat16, torch.bfloat16, "cuda"),
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
    ],
)
def test_what_need_not_be_converted_is_not_cut_into_tiles(dtype, stored, one_product, monkeypatch, device):
    monkeypatch.setattr(products, "TILE_ELEMENTS", 5 * SIZE)
    hidden, weight = tensor(ROWS, SIZE, dtype=dtype, seed=0), tensor(VOCABULARY, SIZE, dtype=stored, seed=1)

    with Products() as record:
        project(hidden, weight, torch.empty(ROWS, VOCABULARY, dtype=wide(dtype)), dtype)

    assert len(record.seen) == (1 if one_product in (True, device.type) else 5)


@pytest.fixture(params=["none", "ieee"])
def before(request):
    settings = torch.backends.mkldnn.matmul
    found, settings.fp32_precision = settings.fp32_precision, request.param
    yield request.param
    settings.fp32_precision = found


def each_product(dtype):
    grad, hidden = (tensor(ROWS, size, dtype=dtype, seed=size) for size in (VOCABULARY, SIZE))
    weight = tensor(VOCABULARY, SIZE, dtype=dtype, seed=1)
    project(hidden, weight, torch.empty(ROWS, VOCABULARY, dtype=wide(dtype)), dtype)
    project_back(grad, weight, torch.empty(ROWS, SIZE, dtype=wide(dtype)), dtype)
    for first in (True, False):
        add_outer(grad, hidden, torch.zeros(VOCABULARY, SIZE, dtype=wide(dtype)), dtype, first=first)


@pytest.mark.cpu("a GPU multiplies half precision as it is")
@pytest.mark.parametrize("dtype", FLOATS)
def test_only_products_of_bf16_values_may_run_in_bf16(dtype, before):
    with Products() as record:
        each_product(dtype)

    expected = "bf16" if dtype == torch.bfloat16 else before
    assert record.seen == [(wide(dtype), expected)] * 4
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_precision_is_restored_after_an_error(before):
    hidden, weight = (torch.zeros(3, size, dtype=torch.bfloat16) for size in (4, 5))

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        project(hidden, weight, torch.empty(3, 3), torch.bfloat16)

    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_half_precision_products_are_summed_in_fp32():
    # 1 + 4096 · 2⁻¹²: bf16 and fp16 would stay at 1
    for dtype in (torch.bfloat16, torch.float16):
        hidden = torch.cat([torch.ones(1, 1), torch.full((1, 4096), 2.0**-6)], dim=1).to(dtype)
        out = torch.empty(1, 1)
        project(hidden, hidden, out, dtype)
        assert out.item() == 2.0
