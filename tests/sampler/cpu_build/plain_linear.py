"""
Keeps the weights of linear layers as they are.

On the CPU, vLLM packs them for its own matrix product when a model is loaded. Weights that are sent later would land
beside the packed ones, and the model would go on with those.
"""

import torch
from vllm.model_executor.layers import utils


def register() -> None:
    """Entry point of vLLM's plugin group `vllm.general_plugins`."""

    def leave_unpacked(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = leave_unpacked
