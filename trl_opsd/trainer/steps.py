"""What happens between the steps."""

from collections.abc import Callable

import torch
from transformers import TrainerCallback

from ..signal import Signals
from ..teacher import Teacher
from .metrics import Metrics


class StepCallback(TrainerCallback):
    """
    Moves the coefficients and the teacher along with the steps.

    Args:
        teacher ([`Teacher`]):
            Follows the policy.
        signals ([`Signals`]):
            Have schedules.
        metrics ([`Metrics`]):
            What the schedules see of a step.
        mark (`Callable[[], None]`):
            Notes where a step begins.
    """

    def __init__(self, teacher: Teacher, signals: Signals, metrics: Metrics, mark: Callable[[], None]):
        self._teacher, self._signals, self._metrics, self._mark = teacher, signals, metrics, mark

    def on_step_begin(self, args, state, control, **kwargs):
        self._mark()
        self._signals.begin_step(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self._teacher.on_step_end(state.global_step)
        self._signals.observe(state.global_step, self._metrics.latest)
        self._mark()  # where the next one begins


class OrderOfEpochs(TrainerCallback):
    """
    Draws the order of each epoch anew. GRPOTrainer goes on with one generator, which a resumed run would begin anew:
    with the order of epoch 0.

    Args:
        generator (`torch.Generator`, *optional*):
            Of the sampler that draws it.
    """

    def __init__(self, generator: torch.Generator | None):
        self._generator = generator

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self._generator is not None:
            self._generator.manual_seed(args.seed + int(state.epoch or 0))
