from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .base import Teacher
from .copies import copy_of
from .sharding import copy_parameter


class PeriodicTeacher(Teacher):
    """
    A copy of the policy, refreshed every `update_steps` optimizer steps, the teacher of
    [CRISP/OPSDC](https://huggingface.co/papers/2603.05433). Its weights are part of every checkpoint.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, not yet wrapped.
        update_steps (`int`):
            Optimizer steps between two refreshes.
        shard (`Callable[[nn.Module], nn.Module]`):
            Wraps a copy for the distributed setup in use.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        update_steps: int,
        shard: Callable[[nn.Module], nn.Module],
    ):
        self._copy = copy_of(policy, shard)
        self._update_steps = update_steps

    def weights(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        return self._copy.weights(policy)

    def on_step_end(self, step: int) -> None:
        if step % self._update_steps == 0:
            for _, student, teacher in self._copy.pairs():
                copy_parameter(student, teacher)

    def save(self, directory: Path, is_main_process: bool) -> None:
        self._copy.save(directory, is_main_process)

    def load(self, directory: Path) -> None:
        self._copy.load(directory)
