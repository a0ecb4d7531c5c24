"""A teacher whose weights stay in CPU memory."""

import torch
from accelerate import cpu_offload
from torch import nn


def offload(model: nn.Module, device: torch.device) -> nn.Module:
    """
    Keep a model's weights in CPU memory. Each module's come to the device for its own forward pass.

    Args:
        model (`nn.Module`):
            A model whose weights are no longer trained. From now on its parameters are placeholders; those it had hold
            the weights.
        device (`torch.device`):
            Where it computes.
    """
    model.to("cpu")
    return cpu_offload(model, execution_device=device, state_dict=model.state_dict())
