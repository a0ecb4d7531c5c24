"""The ways to hold the teacher's weights beside the student's."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import use_adapter

from .sharding import copy_parameter


ADAPTER_NAME = "teacher"


class TeacherCopy(Protocol):
    """Weights that can be used in place of the policy's, and set to the policy's of the moment."""

    def weights(self, policy: nn.Module) -> AbstractContextManager[nn.Module]: ...

    def refresh(self, policy: nn.Module) -> None: ...

    def parameters(self) -> dict[str, nn.Parameter]: ...


class AdapterCopy:
    """A second, frozen adapter on the policy's own base model."""

    def __init__(self, policy: PeftModel):
        self._student_adapter = policy.active_adapter
        config = policy.peft_config[self._student_adapter]
        if hasattr(config, "init_lora_weights"):
            # Initialisations such as PiSSA would change the base weights a second time
            config = dataclasses.replace(config, init_lora_weights=True)
        policy.add_adapter(ADAPTER_NAME, config, autocast_adapter_dtype=False)
        for student, teacher in self._pairs(policy):
            teacher.requires_grad_(False)
            if not hasattr(teacher, "ds_id"):
                teacher.data = teacher.data.to(student.dtype)
        self._policy = policy
        self.refresh(policy)

    def _pairs(self, policy: PeftModel) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        parameters = dict(policy.named_parameters())
        for name, parameter in parameters.items():
            parts = name.split(".")
            if self._student_adapter in parts:
                twin = [ADAPTER_NAME if part == self._student_adapter else part for part in parts]
                yield parameter, parameters[".".join(twin)]

    def weights(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        return _with_adapter(policy, ADAPTER_NAME)

    def refresh(self, policy: nn.Module) -> None:
        for student, teacher in self._pairs(policy):
            copy_parameter(student, teacher)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._policy.named_parameters() if ADAPTER_NAME in name.split(".")}


class ModelCopy:
    """
    A frozen copy of the whole policy.

    Args:
        policy ([`~transformers.PreTrainedModel`]):
            Policy, not yet wrapped.
        shard (`Callable[[nn.Module], nn.Module]`):
            Wraps the copy for the distributed setup in use.
    """

    def __init__(self, policy: PreTrainedModel, shard: Callable[[nn.Module], nn.Module]):
        if is_deepspeed_zero3_enabled():  # sharded parameters cannot be deep-copied; fresh ones are sharded at birth
            model = type(policy)._from_config(policy.config, dtype=policy.dtype)
            for source, target in zip(policy.parameters(), model.parameters(), strict=True):
                copy_parameter(source, target)
        else:
            model = copy.deepcopy(policy)
            # A patched `forward` is bound to the policy it was patched on
            model.__dict__.pop("forward", None)
        model.requires_grad_(False).eval()
        self._model = model
        self._wrapped = shard(model)

    @contextmanager
    def weights(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield self._wrapped

    def refresh(self, policy: nn.Module) -> None:
        for source, target in zip(policy.parameters(), self._model.parameters(), strict=True):
            copy_parameter(source, target)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._model.named_parameters())


def copy_of(policy: PreTrainedModel | PeftModel, shard: Callable[[nn.Module], nn.Module]) -> TeacherCopy:
    """The leanest copy of the policy's present weights: of the adapter if it has one, of everything if not."""
    return AdapterCopy(policy) if isinstance(policy, PeftModel) else ModelCopy(policy, shard)


@contextmanager
def _with_adapter(policy: nn.Module, adapter_name: str | None) -> Iterator[nn.Module]:
    with use_adapter(extract_model_from_parallel(policy), adapter_name):
        yield policy


def without_adapter(policy: nn.Module) -> AbstractContextManager[nn.Module]:
    """Context manager that yields the policy with its adapter switched off."""
    return _with_adapter(policy, None)
