"""What happens between the steps."""

import warnings
from collections.abc import Callable, Mapping

import torch
from transformers import TrainerCallback

from ..help import did_you_mean
from ..signal import Signals
from ..teacher import Teacher
from .metrics import Metrics, add_peak_memory


class StepCallback(TrainerCallback):
    """
    Moves the coefficients and the teacher along with the steps, and warns once if the clip eats up the divergence, or
    if a schedule follows what is not measured.

    Args:
        teacher ([`Teacher`]):
            Follows the policy.
        signals ([`Signals`]):
            Have schedules.
        metrics ([`Metrics`]):
            What the schedules see of a step, and where goes what it took.
        clip (`float`, *optional*):
            Clip of the divergence.
        mark (`Callable[[], None]`):
            Notes where a step begins.
        take_seconds (`Callable[[], float]`):
            Gives the seconds that sampling took since it was last asked.
    """

    def __init__(
        self,
        teacher: Teacher,
        signals: Signals,
        metrics: Metrics,
        clip: float | None,
        mark: Callable[[], None],
        take_seconds: Callable[[], float],
    ):
        self._teacher, self._signals, self._metrics, self._mark = teacher, signals, metrics, mark
        self._take_seconds = take_seconds
        self._clip, self._has_warned, self._has_measured = clip, False, False

    def on_step_begin(self, args, state, control, **kwargs):
        self._mark()
        self._signals.begin_step(state.global_step)
        for name, value in self._signals.scheduled.items():
            self._metrics.add_rate(f"schedules/{name}", *torch.tensor([value, 1.0], device=args.device))

    def on_step_end(self, args, state, control, **kwargs):
        self._teacher.on_step_end(state.global_step)
        self._signals.observe(state.global_step, self._metrics.latest)
        self._report_unmeasured(self._metrics.latest)
        add_peak_memory(self._metrics, args.device)
        seconds = torch.tensor([self._take_seconds(), 1.0], device=args.device)
        self._metrics.add_rate("sampling/step_time", *seconds)
        self._mark()  # where the next one begins

    def _report_unmeasured(self, measured: Mapping[str, float]) -> None:
        if self._has_measured or not measured:
            return
        self._has_measured = True
        for name, schedule in self._signals.schedules.items():
            if schedule.metric is not None and schedule.metric not in measured:
                hint = did_you_mean(schedule.metric, measured)
                warnings.warn(
                    f"`schedules[{name!r}]` follows the metric `{schedule.metric}`, which the first step has not "
                    f"measured. As long as it is not, the schedule sees nothing. {hint}",
                    stacklevel=2,
                )

    def on_log(self, args, state, control, logs=None, **kwargs):
        logged = logs or {}
        loss = logged.get("distillation_loss") or logged.get("eval_distillation_loss") or 0.0
        if self._clip is not None and loss < 0.0 and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"With `divergence_clip={self._clip}` the mean loss of a step is negative ({loss:.4g}): the clip "
                "cuts so much of the positive entries that the sum is no divergence any more, and making it smaller "
                "need not bring the student closer to the teacher. Raise the clip.",
                stacklevel=2,
            )


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
