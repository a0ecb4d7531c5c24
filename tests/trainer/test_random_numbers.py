"""Streams of random numbers, each its own, whose use leaves no trace in the others."""

import random

import numpy as np
import pytest
import torch

from trl_opsd.trainer.random_numbers import random_numbers


def draw(device):
    devices = {torch.device("cpu"), device}
    return [random.random(), np.random.rand(), *(torch.rand((), device=one).item() for one in devices)]


@pytest.mark.parametrize("fails", [False, True])
def test_generators_go_on_as_if_nothing_had_been_drawn(fails, device):
    def continue_after(key):
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)
        if key is not None:
            try:
                with random_numbers(*key, device=device):
                    draw(device)
                    if fails:
                        raise RuntimeError
            except RuntimeError:
                pass
        return draw(device)

    assert continue_after((4, 5)) == continue_after(None)


def test_numbers_follow_from_the_key_alone(device):
    def draw_by(*key):
        with random_numbers(*key, device=device):
            return draw(device)

    first = draw_by(7, 0)
    draw(device)
    assert draw_by(7, 0) == first
    for key in ((7, 1), (8, 0), (7,), (0, 7)):
        assert all(one != other for one, other in zip(draw_by(*key), first, strict=True))
