from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .base import Teacher
from .copies import copy_of
from .files import load_parts, save_parts
from .sharding import part_of, write_part


class EMATeacher(Teacher):
    """
    An exponential moving average of the policy: it starts as the policy, and after every optimizer step θ_T ←
    (1 − r)·θ_T + r·θ.

    The average is kept in fp32 whatever the policy's dtype, since steps of a small rate round to nothing in half
    precision, and sharded as the policy is. In fp32 training, the teacher's weights are the average itself. It is part
    of every checkpoint.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, not yet wrapped.
        rate (`float`):
            r, the share of the policy in each update.
        shard (`Callable[[nn.Module], nn.Module]`):
            Wraps a copy for the distributed setup in use.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        rate: float,
        shard: Callable[[nn.Module], nn.Module],
    ):
        self._copy = copy_of(policy, shard)
        self._rate = rate

    @cached_property
    def _average(self) -> dict[str, torch.Tensor]:
        # Made when it is first needed, because what a process holds of a parameter is known once training has begun
        return {name: part_of(teacher).float() for name, _, teacher in self._copy.pairs()}

    def weights(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        return self._copy.weights(policy)

    def on_step_end(self, step: int) -> None:
        for name, student, teacher in self._copy.pairs():
            average = self._average[name]
            average.lerp_(part_of(student).to(average), self._rate)
            write_part(teacher, average)

    def save(self, directory: Path, is_main_process: bool) -> None:
        parts = ((name, teacher, self._average[name]) for name, _, teacher in self._copy.pairs())
        save_parts(directory, parts, is_main_process)

    def load(self, directory: Path) -> None:
        parameters = {name: teacher for name, _, teacher in self._copy.pairs()}
        for name, part in load_parts(directory, parameters):
            self._average[name].copy_(part)
            write_part(parameters[name], self._average[name])
