from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from .base import Teacher
from .copies import copy_of
from .sharding import full_value, set_value


_FILE = "teacher.safetensors"


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

    def on_step_end(self, policy: nn.Module, step: int) -> None:
        if step % self._update_steps == 0:
            self._copy.refresh(policy)

    def save(self, directory: Path, is_main_process: bool) -> None:
        values = {}
        for name, parameter in self._copy.parameters().items():
            value = full_value(parameter)
            if is_main_process:
                values[name] = value.contiguous()
        if is_main_process:
            save_file(values, directory / _FILE)

    def load(self, directory: Path) -> None:
        file = directory / _FILE
        if not file.exists():
            raise ValueError(
                f"{directory} holds no {_FILE}, so it was not written by a run with a periodic teacher. Resume from a "
                "checkpoint of such a run, or set the `teacher` it was written with."
            )
        values = load_file(file)
        for name, parameter in self._copy.parameters().items():
            set_value(parameter, values[name])
