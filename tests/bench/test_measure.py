import time

import pytest
import torch

from trl_opsd.bench import measure
from trl_opsd.bench.measure import PeakMemory


MIB = 2**20


def allocate(mib, seen_by=None):
    """Memory that is in use, and is held until samples, where they are taken, have seen it."""
    tensor = torch.ones(mib * MIB, dtype=torch.uint8)
    sampler = getattr(seen_by, "_sampler", None)
    while sampler is not None and sampler.peak < measure.memory_in_use(tensor.device):
        time.sleep(0.001)
    return tensor


@pytest.mark.parametrize("resettable", [True, False])
def test_known_allocation(resettable, monkeypatch, device):
    if not resettable:
        monkeypatch.setattr(measure, "_reset_high_water_mark", lambda: False)
    peak = PeakMemory(device)
    allocate(64, seen_by=peak)
    assert 60 <= peak.stop() / MIB <= 72


@pytest.mark.parametrize("resettable", [True, False])
def test_restart_forgets_the_peak_but_not_the_start(resettable, monkeypatch, device):
    if not resettable:
        monkeypatch.setattr(measure, "_reset_high_water_mark", lambda: False)
    peak = PeakMemory(device)
    kept = allocate(16)
    allocate(128, seen_by=peak)
    peak.restart()
    allocate(32, seen_by=peak)
    assert 44 <= peak.stop() / MIB <= 56
    assert kept.size(0) == 16 * MIB


@pytest.mark.cpu("the C library's memory")
def test_what_was_freed_before_hides_nothing():
    # Many small pieces stay with the C library when they are freed
    pieces = [bytearray(4096) for _ in range(16 * 256)]
    del pieces
    peak = PeakMemory(torch.device("cpu"))
    pieces = [bytearray(4096) for _ in range(16 * 256)]
    assert peak.stop() / MIB >= 14
    assert len(pieces) == 16 * 256
