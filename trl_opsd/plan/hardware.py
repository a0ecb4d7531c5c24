"""What accelerators can do, as their vendors publish it."""

import re
from typing import NamedTuple

import psutil

from ..help import did_you_mean


class GPU(NamedTuple):
    """
    An accelerator.

    Args:
        name (`str`):
            Name.
        memory (`int`):
            Bytes.
        flops (`float`):
            Dense bf16 matrix products, FLOP/s with sums in fp32. 0 where it is not known.
        bandwidth (`float`):
            Of its memory, bytes/s.
        link (`float`):
            To the other GPUs, bytes/s in each direction.
        source (`str`):
            Where the figures are from.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    source: str

    @property
    def is_cpu(self) -> bool:
        """Whether it is this machine's processor."""
        return self.name == "CPU"


# Name: GB, dense bf16 TFLOP/s, GB/s of its memory, GB/s to its neighbours in each direction, source. NVLink where a
# card has it, else PCI Express x16. A GB is 10⁹ bytes, the least it can mean
_PUBLISHED = {
    "B200-180GB": (180, 2250, 7700, 900, "NVIDIA DGX B200 datasheet"),
    "H200-141GB": (141, 989, 4800, 450, "NVIDIA H200 datasheet"),
    "GH200-96GB": (96, 989, 4000, 450, "NVIDIA GH200 datasheet"),
    "H100-80GB": (80, 989, 3350, 450, "NVIDIA H100 datasheet, SXM"),
    "H100PCIE-80GB": (80, 756, 2000, 64, "NVIDIA H100 datasheet, PCIe"),
    "A100-80GB": (80, 312, 2039, 300, "NVIDIA A100 datasheet, SXM"),
    "A100-40GB": (40, 312, 1555, 300, "NVIDIA A100 datasheet, SXM"),
    "L40S-48GB": (48, 362, 864, 32, "NVIDIA L40S datasheet"),
    "A10-24GB": (24, 125, 600, 32, "NVIDIA A10 datasheet"),
    "L4-24GB": (24, 121, 300, 32, "NVIDIA L4 datasheet"),
    "RTXPRO6000-96GB": (96, 503, 1792, 64, "NVIDIA RTX Blackwell PRO whitepaper"),
    "RTX6000ADA-48GB": (48, 364, 960, 32, "NVIDIA Ada whitepaper"),
    "RTX5090-32GB": (32, 209, 1792, 64, "NVIDIA RTX Blackwell whitepaper"),
    "RTX4090-24GB": (24, 165, 1008, 32, "NVIDIA Ada whitepaper"),
    "RTX3090-24GB": (24, 71, 936, 32, "NVIDIA Ampere GA102 whitepaper"),
}
GPUS = {
    name: GPU(name, gb * 10**9, tflops * 1e12, bandwidth * 1e9, link * 1e9, source)
    for name, (gb, tflops, bandwidth, link, source) in _PUBLISHED.items()
}
_OWN = re.compile(r":([\d.]+)GB,([\d.]+)TFLOPS,([\d.]+)GB/s(?:,([\d.]+)GB/s)?", re.IGNORECASE)


def parse_gpus(text: str) -> tuple[int, GPU]:
    """
    Read `--gpus`.

    Args:
        text (`str`):
            Number and kind, `"8xH100-80GB"`, the size being left out where there is one (`"8xH200"`); a GPU that is
            not listed by its memory, dense bf16 FLOP/s, memory bandwidth and, if there are several, bandwidth to the
            others: `"8x:80GB,990TFLOPS,3350GB/s,450GB/s"`; or `"1xCPU"`, this machine without a GPU.

    Returns:
        `tuple[int, GPU]`: how many, and which.

    Raises:
        ValueError: If there is no such GPU, with the list.
    """
    match = re.fullmatch(r"(\d+)\s*x\s*(.+)", text.strip(), re.IGNORECASE)
    known = f"{', '.join(GPUS)} and CPU"
    if match is None or int(match[1]) == 0:
        raise ValueError(f"`--gpus {text}` is no number and kind of GPU, such as 8xH100-80GB. Known are {known}.")
    number, name = int(match[1]), match[2].strip()
    if own := _OWN.fullmatch(name.replace(" ", "")):
        memory, tflops, bandwidth, link = (float(value) if value else 32.0 for value in own.groups())
        return number, GPU(name[1:], int(memory * 1e9), tflops * 1e12, bandwidth * 1e9, link * 1e9, "--gpus")
    wanted = re.sub(r"[\s_]", "", name).upper()
    if wanted == "CPU":
        return number, GPU("CPU", psutil.virtual_memory().total, 0.0, 0.0, 0.0, "this machine")
    found = [gpu for key, gpu in GPUS.items() if wanted in (key, key.partition("-")[0], key.replace("-", ""))]
    if len(found) != 1:
        several = f" It could be {' or '.join(gpu.name for gpu in found)}." if found else ""
        hint = several or f" {did_you_mean(wanted, GPUS, ' ').strip()}".rstrip()
        raise ValueError(
            f"`--gpus {text}`: no GPU is known as {name!r}.{hint} Known are {known}; any other is given as "
            f"{number}x:80GB,990TFLOPS,3350GB/s (memory, dense bf16 FLOP/s, memory bandwidth), and a fourth figure in "
            "GB/s for the way to the other GPUs."
        )
    return number, found[0]
