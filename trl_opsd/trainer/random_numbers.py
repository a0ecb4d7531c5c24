"""Random numbers for one purpose, of which those for all others know nothing."""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch


@contextmanager
def random_numbers(*key: int, device: torch.device) -> Iterator[None]:
    """
    Have all generators of the process (Python's, NumPy's and PyTorch's) draw what a key decides.

    Afterwards they go on as if nothing had been drawn.

    Args:
        key (`int`):
            What tells this stream of random numbers from others.
        device (`torch.device`):
            Device the process computes on. The generators of all devices of its kind are meant.
    """
    seed = hash(key) % 2**32  # not of strings, so the same in every process
    num_devices = 0 if device.type == "cpu" else torch.get_device_module(device).device_count()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(num_devices), device_type="cuda" if device.type == "cpu" else device.type):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class Draws:
    """
    Random numbers by step, so that a resumed run draws the same, and so do the processes of a tensor-parallel engine,
    whose own random numbers part ways in training.

    Args:
        seed (`int`):
            Seed of the run.
        index (`int`):
            What tells this process from those that draw others.
        device (`torch.device`):
            See [`random_numbers`].
    """

    def __init__(self, seed: int, index: int, device: torch.device):
        self._seed, self._index, self._device = seed, index, device
        self._num_draws: dict[tuple[int, ...], tuple[tuple[int, ...], int]] = {}

    def __call__(self, step: int, training: bool, *stream: int) -> AbstractContextManager[None]:
        """
        As [`random_numbers`], others at each call.

        Args:
            step (`int`):
                Optimizer steps done.
            training (`bool`):
                Whether it is for training, and not for an evaluation.
            stream (`int`):
                What tells a purpose from others.
        """
        key = (step, int(training), self._index)
        last_key, num_draws = self._num_draws.get(stream, (key, -1))
        num_draws = num_draws + 1 if key == last_key else 0
        self._num_draws[stream] = key, num_draws
        return random_numbers(self._seed, *key, num_draws, *stream, device=self._device)
