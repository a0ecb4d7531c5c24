from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, logging


logger = logging.get_logger(__name__)


class SkipNonFiniteSteps(TrainerCallback):
    """
    Skips optimizer steps whose gradient is not finite, and counts them.

    One NaN in a gradient would turn every weight into NaN. Such a step leaves the weights and the optimizer's moments
    as they are. The norm that decides is the same on every process under DDP and FSDP2. DeepSpeed, which keeps the
    gradients to itself, and fp16, whose loss scaler skips such steps already, are left alone.

    Attributes:
        skipped_steps (`int`):
            Steps skipped so far.
    """

    def __init__(self):
        self.skipped_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run counts on from."""
        return {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what [`state_dict`] returned."""
        self.skipped_steps = state["skipped_steps"]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ):
        if args.fp16:
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not gradients:
            return
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if torch.isfinite(norm):
            return
        model.zero_grad()
        self.skipped_steps += 1
        logger.warning(
            f"The gradient of optimizer step {state.global_step + 1} is not finite: the step is skipped "
            f"({self.skipped_steps} so far)."
        )
