"""Random numbers for one purpose, of which those for all others know nothing."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

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
