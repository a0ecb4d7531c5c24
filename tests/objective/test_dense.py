import itertools

import pytest
import torch

from trl_opsd.objective import generalized_jsd_loss


@pytest.fixture(scope="module")
def gkd_loss():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.gkd import GKDTrainer
    return GKDTrainer.generalized_jsd_loss


def make_logits(shape=(2, 5, 7)):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * 2
    return student.requires_grad_(), teacher.requires_grad_()


LABELS = torch.tensor([[-100, -100, 3, 1, 2], [-100, 4, 0, -100, -100]])
BETAS = [0, 0.0, 0.1, 0.5, 0.8, 1, 1.0]
REDUCTIONS = ["batchmean", "sum", "mean", "none"]
NUM_ITEMS = [None, 11, torch.tensor(11)]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("labels", [None, LABELS], ids=["unmasked", "masked"])
def test_equals_gkd_trainer_in_values_and_gradients(gkd_loss, beta, temperature, labels):
    for reduction, num_items in itertools.product(REDUCTIONS, NUM_ITEMS):
        options = {
            "labels": labels,
            "beta": beta,
            "temperature": temperature,
            "reduction": reduction,
            "num_items_in_batch": num_items,
        }
        ours, theirs = generalized_jsd_loss(*make_logits(), **options), gkd_loss(*make_logits(), **options)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)

        logits, expected_logits = make_logits(), make_logits()
        generalized_jsd_loss(*logits, **options).sum().backward()
        gkd_loss(*expected_logits, **options).sum().backward()
        for tensor, expected in zip(logits, expected_logits, strict=True):
            torch.testing.assert_close(tensor.grad, expected.grad, rtol=1e-7, atol=1e-12)


def test_defaults_equal_gkd_trainer(gkd_loss):
    torch.testing.assert_close(generalized_jsd_loss(*make_logits()), gkd_loss(*make_logits()))
    torch.testing.assert_close(generalized_jsd_loss(*make_logits(), LABELS), gkd_loss(*make_logits(), LABELS))


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_everything_masked_is_zero_with_zero_gradient(gkd_loss, reduction):
    student, teacher = make_logits()
    labels = torch.full_like(LABELS, -100)

    loss = generalized_jsd_loss(student, teacher, labels, reduction=reduction)
    loss.backward()

    assert loss.item() == gkd_loss(student, teacher, labels, reduction=reduction).item() == 0.0
    assert student.grad.count_nonzero() == 0


def test_token_impossible_for_both_is_left_out():
    student, teacher = (logits.detach() for logits in make_logits())
    blocked = torch.full((2, 5, 1), -torch.inf, dtype=torch.float64)

    for beta in BETAS:
        torch.testing.assert_close(
            generalized_jsd_loss(torch.cat([student, blocked], -1), torch.cat([teacher, blocked], -1), beta=beta),
            generalized_jsd_loss(student, teacher, beta=beta),
        )
