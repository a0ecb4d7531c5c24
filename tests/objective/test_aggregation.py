import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_opsd.objective import aggregation_weights


LOSS_TYPES = ["grpo", "sapo", "luspo", "dr_grpo", "bnpo", "dapo", "cispo", "vespo"]
MAX_COMPLETION_LENGTH = 9

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
LOSSES = torch.tensor([[1.0, 2.0, 3.0, 50.0], [5.0, 50.0, 50.0, 50.0], [50.0] * 4, [1.0, 1.0, 2.0, 4.0]])


def aggregate(losses, mask, loss_type, num_tokens, num_rows=None):
    num_rows = mask.any(dim=1).sum().clamp(min=1) if num_rows is None else torch.tensor(num_rows)
    weights = aggregation_weights(mask, loss_type, num_rows, torch.tensor(num_tokens), MAX_COMPLETION_LENGTH)
    return (weights * losses).sum().item()


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        # Sequences: sums 6, 5, 0, 8; means 2, 5, -, 2. Eight tokens; 16 with the other process's.
        ("grpo", (2 + 5 + 2) / 3),
        ("sapo", (2 + 5 + 2) / 3),
        ("luspo", (6 + 5 + 8) / 3),
        ("dr_grpo", (6 + 5 + 8) / (3 * 9)),
        ("bnpo", (6 + 5 + 0 + 8) / 8),
        ("dapo", (6 + 5 + 0 + 8) / 16),
        ("cispo", (6 + 5 + 0 + 8) / 16),
        ("vespo", (6 + 5 + 0 + 8) / 16),
    ],
)
def test_by_hand(loss_type, expected):
    assert aggregate(LOSSES, MASK, loss_type, 16.0) == pytest.approx(expected)


def nested_loops(losses, mask, loss_type, num_tokens):
    """What GRPOTrainer's documentation says of each loss type, sequence by sequence."""
    sequences = [
        [loss for loss, kept in zip(*row, strict=True) if kept]
        for row in zip(losses.tolist(), mask.tolist(), strict=True)
    ]
    total, size = sum(map(sum, sequences)), max(sum(map(bool, sequences)), 1)
    if loss_type in ("grpo", "sapo"):
        return sum(sum(sequence) / max(len(sequence), 1) for sequence in sequences) / size
    if loss_type == "luspo":
        return total / size
    if loss_type == "dr_grpo":
        return total / size / MAX_COMPLETION_LENGTH
    if loss_type == "bnpo":
        return total / max(sum(map(len, sequences)), 1)
    return total / num_tokens


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(LOSS_TYPES), st.integers(1, 6), st.integers(1, 7))
def test_equals_the_plain_formula(data, loss_type, num_sequences, width):
    lengths = data.draw(st.lists(st.integers(0, width), min_size=num_sequences, max_size=num_sequences))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    num_tokens = data.draw(st.floats(1, 1000))
    losses = torch.randn(mask.shape, generator=torch.Generator().manual_seed(num_sequences * width))

    assert aggregate(losses, mask, loss_type, num_tokens) == pytest.approx(
        nested_loops(losses, mask, loss_type, num_tokens), rel=1e-4, abs=1e-5
    )


@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "bnpo"])
def test_split_into_micro_batches_changes_nothing(loss_type):
    whole = aggregate(LOSSES, MASK, loss_type, 8.0)

    for parts in (2, 4):
        pieces = zip(LOSSES.chunk(parts), MASK.chunk(parts), strict=True)
        split = [aggregate(losses, mask, loss_type, 8.0 / parts, 3.0 / parts) for losses, mask in pieces]
        assert sum(split) / parts == pytest.approx(whole)


def test_only_bnpo_depends_on_the_micro_batch():
    split = [aggregate(LOSSES[rows], MASK[rows], "bnpo", 8.0) for rows in ([0, 3], [1, 2])]

    assert split == pytest.approx([14 / 7, 5 / 1])
    assert sum(split) / 2 != pytest.approx(aggregate(LOSSES, MASK, "bnpo", 8.0))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_padding_changes_nothing(loss_type):
    padded = torch.nn.functional.pad

    assert aggregate(padded(LOSSES, (0, 3), value=9.0), padded(MASK, (0, 3)), loss_type, 8.0) == pytest.approx(
        aggregate(LOSSES, MASK, loss_type, 8.0)
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
def test_nothing_to_learn_from_weighs_nothing(loss_type, dtype):
    weights = aggregation_weights(torch.zeros(2, 3, dtype=dtype), loss_type, *torch.ones(2), MAX_COMPLETION_LENGTH)

    assert weights.dtype == torch.float32
    assert weights.tolist() == [[0.0] * 3] * 2


def test_weights_of_a_long_bf16_mask_are_exact():
    # bf16 cannot count to 300
    weights = aggregation_weights(torch.ones(1, 301, dtype=torch.bfloat16), "grpo", *torch.ones(2), None)

    assert weights[0, 0].item() == pytest.approx(1 / 301, rel=1e-6)


def test_unknown_loss_type():
    with pytest.raises(ValueError, match=r"`loss_type` must be one of .*'dr_grpo'.*, got 'ppo'"):
        aggregation_weights(MASK, "ppo", *torch.ones(2), None)
