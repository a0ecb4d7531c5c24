import io
from contextlib import redirect_stdout

import torch
from trl.scripts.env import print_env as print_trl_env

import trl_opsd

from ..objective import default_kernel


QWEN3_VOCABULARY = 151_936


def print_env() -> None:
    """Print the versions that a bug report should name, and what computes the divergence of a large vocabulary."""
    with redirect_stdout(io.StringIO()) as trl_env:
        print_trl_env()
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [torch.device("cpu")]
    kernels = ", ".join(f"{default_kernel(device, QWEN3_VOCABULARY)} on {device}" for device in devices)
    print(f"{trl_env.getvalue().rstrip()}\n- trl-opsd version: {trl_opsd.__version__}")
    print(f"- Divergence kernel: {kernels}\n")


if __name__ == "__main__":
    print_env()
