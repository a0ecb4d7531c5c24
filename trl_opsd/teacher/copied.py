"""A copy of the policy as the teacher, and the rules by which it follows the policy."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .base import Teacher
from .copies import ADAPTER_NAME, AdapterCopy, TeacherCopy, copy_of
from .files import load_parts, save_parts
from .sharding import copy_parameter, part_of, write_part


class UpdateRule(ABC):
    """
    When and how a copy, which starts as the policy, follows it.

    Attributes:
        description (`str`):
            What the copy is, see [`Teacher`].
    """

    description: str

    @abstractmethod
    def on_step_end(self, copy: TeacherCopy, step: int) -> None:
        """Called on every process after optimizer step number `step`."""

    def parts(self, copy: TeacherCopy) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
        """What belongs into checkpoints: name, parameter it is sharded like, and this process's part."""
        for name, _, teacher in copy.pairs():
            yield name, teacher, part_of(teacher)

    def restore(self, name: str, teacher: nn.Parameter, part: torch.Tensor) -> None:
        """Take back one of [`parts`]."""
        write_part(teacher, part)


class Never(UpdateRule):
    """The policy as training started, the teacher of [OPSD](https://huggingface.co/papers/2601.18734)."""

    description = "the policy as training started"

    def on_step_end(self, copy: TeacherCopy, step: int) -> None:
        pass


class Periodic(UpdateRule):
    """
    A hard copy every `update_steps` optimizer steps, the teacher of
    [CRISP/OPSDC](https://huggingface.co/papers/2603.05433).

    Args:
        update_steps (`int`):
            Optimizer steps between two refreshes.
    """

    def __init__(self, update_steps: int):
        self._update_steps = update_steps
        self.description = f"a copy of the student, renewed every {update_steps} optimizer steps"

    def on_step_end(self, copy: TeacherCopy, step: int) -> None:
        if step % self._update_steps == 0:
            for _, student, teacher in copy.pairs():
                copy_parameter(student, teacher)


class EMA(UpdateRule):
    """
    An exponential moving average: after every optimizer step θ_T ← (1 − r)·θ_T + r·θ.

    The average is kept in fp32 whatever the policy's dtype, since steps of a small rate round to nothing in half
    precision, and sharded as the policy is. In fp32 training, the teacher's weights are the average itself. It is part
    of every checkpoint.

    Args:
        rate (`float`):
            r, the share of the policy in each update.
    """

    def __init__(self, rate: float):
        self.rate = rate
        self.description = f"a moving average of the student, {rate} of it after every optimizer step"
        self._averages: dict[str, torch.Tensor] = {}

    def _average(self, name: str, teacher: nn.Parameter) -> torch.Tensor:
        # Made when it is first needed, because what a process holds of a parameter is known once training has begun
        if name not in self._averages:
            self._averages[name] = part_of(teacher).float()
        return self._averages[name]

    def on_step_end(self, copy: TeacherCopy, step: int) -> None:
        for name, student, teacher in copy.pairs():
            average = self._average(name, teacher)
            average.lerp_(part_of(student).to(average), self.rate)
            write_part(teacher, average)

    def parts(self, copy: TeacherCopy) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
        for name, _, teacher in copy.pairs():
            yield name, teacher, self._average(name, teacher)

    def restore(self, name: str, teacher: nn.Parameter, part: torch.Tensor) -> None:
        average = self._average(name, teacher)
        average.copy_(part)
        write_part(teacher, average)


class CopiedTeacher(Teacher):
    """
    A copy of the policy: a second adapter if it has one, a frozen model if not.

    Checkpoints hold what cannot be made again. A copy that never moves can, unless it is one of an adapter, whose
    initial weights may be random.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, not yet wrapped.
        rule ([`UpdateRule`]):
            How the copy follows it.
        shard (`Callable[[nn.Module], nn.Module]`):
            Wraps a copy for the distributed setup in use.
        adapter_name (`str`, *optional*, defaults to `"teacher"`):
            Name of the second adapter.

    Raises:
        NoSecondAdapterError: If peft allows only one adapter of the policy's kind.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        rule: UpdateRule,
        shard: Callable[[nn.Module], nn.Module],
        adapter_name: str = ADAPTER_NAME,
    ):
        self.rule = rule
        self.description = rule.description
        self.copy = copy_of(policy, shard, adapter_name)
        self._is_saved = isinstance(self.copy, AdapterCopy) or not isinstance(rule, Never)

    def weights(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        return self.copy.weights(policy)

    def on_step_end(self, step: int) -> None:
        self.rule.on_step_end(self.copy, step)

    def save(self, directory: Path, is_main_process: bool) -> None:
        if self._is_saved:
            save_parts(directory, self.rule.parts(self.copy), is_main_process)

    def load(self, directory: Path) -> None:
        if self._is_saved:
            parameters = {name: teacher for name, _, teacher in self.copy.pairs()}
            for name, part in load_parts(directory, parameters):
                self.rule.restore(name, parameters[name], part)
