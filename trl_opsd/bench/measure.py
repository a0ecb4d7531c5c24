"""Time and memory of one iteration, seen from outside the allocator."""

import ctypes
import gc
import threading
import time
from pathlib import Path

import psutil
import torch


_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mark(device: torch.device) -> torch.cuda.Event | float:
    """A moment, for [`seconds_between`]: on a GPU the one at which it gets here, without waiting for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: torch.cuda.Event | float, second: torch.cuda.Event | float) -> float:
    """Seconds from one moment to a later one. On a GPU both must have passed."""
    if isinstance(first, torch.cuda.Event):
        assert isinstance(second, torch.cuda.Event)
        return first.elapsed_time(second) / 1000
    assert not isinstance(second, torch.cuda.Event)
    return second - first


def allocation_retries(device: torch.device) -> int:
    """How often PyTorch found the GPU full and gave back its cache first, which takes time."""
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0)) if device.type == "cuda" else 0


def release_memory(device: torch.device) -> None:
    """Gives back what is not in use, so that an earlier iteration's memory does not hide this one's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    # The C library would keep part of what was freed, and serve the next iteration from it unseen
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def memory_in_use(device: torch.device) -> int:
    """Bytes in use: allocated tensors on a GPU, the resident set of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """
    Highest memory in use above what was in use at the start.

    On a GPU, PyTorch counts. On the CPU it is the resident set of the process: its high-water mark where Linux lets a
    process reset its own, samples taken every millisecond elsewhere.

    Args:
        device (`torch.device`):
            Device whose memory is watched.
    """

    def __init__(self, device: torch.device):
        self._device = device
        release_memory(device)
        self.start = memory_in_use(device)
        self._sampler: _Sampler | None = None
        self.restart()

    def restart(self) -> None:
        """Forgets the peak so far. What was in use at the start stays the reference."""
        release_memory(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._sampler is not None or not _reset_high_water_mark():
            if self._sampler is not None:
                self._sampler.stop()
            self._sampler = _Sampler(self._device)
            self._sampler.start()

    def stop(self) -> int:
        """
        Ends the measurement.

        Returns:
            `int`:
                Peak above the start, in bytes.
        """
        return max(0, self.highest() - self.start)

    def highest(self) -> int:
        """Highest memory in use, in bytes. It ends the measurement."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._sampler.stop() if self._sampler is not None else _status_bytes("VmHWM")


class _Sampler(threading.Thread):
    def __init__(self, device: torch.device):
        super().__init__(daemon=True)
        self.peak = memory_in_use(device)
        self._device = device
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.001):
            self.peak = max(self.peak, memory_in_use(self._device))

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return self.peak


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {name}.")


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
        # Some sandboxes take the request and do nothing
        return _status_bytes("VmHWM") - _status_bytes("VmRSS") < 2**20
    except OSError:
        return False
