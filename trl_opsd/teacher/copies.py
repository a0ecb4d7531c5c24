"""The ways to hold the teacher's weights beside the student's."""

import copy
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .sharding import copy_parameter


ADAPTER_NAME = "teacher"
_ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)


class NoSecondAdapterError(ValueError):
    """An adapter of which peft allows only one."""


class TeacherCopy(ABC):
    """Weights that can be used in place of the policy's. They start as the policy's."""

    @abstractmethod
    def weights(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        """See [`Teacher.weights`]."""

    @abstractmethod
    def pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Every parameter of the copy: its name, the policy's and its own."""


class AdapterCopy(TeacherCopy):
    """
    A second, frozen adapter on the policy's own base model.

    Args:
        policy ([`~peft.PeftModel`]):
            Policy, not yet wrapped.
        name (`str`, *optional*, defaults to `"teacher"`):
            Name of the second adapter.
    """

    def __init__(self, policy: PeftModel, name: str = ADAPTER_NAME):
        self._policy, self._name = policy, name
        self._student_adapter = policy.active_adapter
        if name in policy.peft_config:
            raise ValueError(
                f"The model already has an adapter named {name!r}, the name of the teacher's. Delete it with "
                f"`model.delete_adapter({name!r})`, or load it under another name."
            )
        # With what peft has noted in it: which layers are tied is not found out anew once they are wrapped
        config = copy.deepcopy(policy.peft_config[self._student_adapter])
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # ones such as PiSSA would change the base weights a second time
        if tied := getattr(config, "target_modules_to_tie", None):
            config.ensure_weight_tying = False  # peft would forget them; all values are copied anyway
            if isinstance(config.target_modules, str):
                config.target_modules += "|" + "|".join(map(re.escape, tied))
            else:
                config.target_modules |= tied
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You have requested `ensure_weight_tying`")
            try:
                policy.add_adapter(name, config, autocast_adapter_dtype=False)
                pairs = list(self.pairs())
            except (KeyError, NotImplementedError, TypeError, ValueError) as error:
                raise NoSecondAdapterError(
                    f"needs a second adapter of the policy's kind ({type(config).__name__}), which peft does not "
                    f"give: {error}"
                ) from error
        for _, student, teacher in pairs:
            teacher.requires_grad_(False)
            if not hasattr(teacher, "ds_id"):
                teacher.data = teacher.data.to(student.dtype)
            copy_parameter(student, teacher)

    def weights(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        return with_adapter(policy, self._name)

    def pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        parameters = dict(self._policy.named_parameters(remove_duplicate=False))
        seen: set[nn.Parameter] = set()
        for name, parameter in parameters.items():
            parts = name.split(".")
            if self._student_adapter in parts:
                twin = ".".join(self._name if part == self._student_adapter else part for part in parts)
                teacher = parameters[twin]
                if teacher not in seen:  # one that two modules share has two names
                    seen.add(teacher)
                    yield twin, parameter, teacher


class ModelCopy(TeacherCopy):
    """
    A frozen copy of the whole policy.

    Args:
        policy ([`~transformers.PreTrainedModel`]):
            Policy, not yet wrapped.
        shard (`Callable[[nn.Module], nn.Module]`):
            Wraps the copy for the distributed setup in use, or offloads it.
    """

    def __init__(self, policy: PreTrainedModel, shard: Callable[[nn.Module], nn.Module]):
        self._policy = policy
        if is_deepspeed_zero3_enabled():  # sharded parameters cannot be deep-copied; fresh ones are sharded at birth
            import deepspeed  # here, because importing it interferes with vLLM

            deepspeed.init_distributed()  # or it takes this for the only process
            self._model = type(policy)._from_config(policy.config, dtype=policy.dtype)
            for source, target in zip(policy.parameters(), self._model.parameters(), strict=True):
                copy_parameter(source, target)
        else:
            self._model = copy.deepcopy(policy)
            # A patched `forward` is bound to the policy it was patched on
            self._model.__dict__.pop("forward", None)
        self._model.requires_grad_(False).eval()
        parameters = list(self._model.parameters())
        self._wrapped = shard(self._model)
        self._offloaded = parameters if next(self._model.parameters()).is_meta else None

    @contextmanager
    def weights(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield self._wrapped

    def pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        copies = self._offloaded or self._model.parameters()
        for (name, parameter), twin in zip(self._policy.named_parameters(), copies, strict=True):
            yield name, parameter, twin


def copy_of(
    policy: PreTrainedModel | PeftModel, shard: Callable[[nn.Module], nn.Module], adapter_name: str = ADAPTER_NAME
) -> TeacherCopy:
    """The leanest copy of the policy's present weights: of the adapter if it has one, of everything if not."""
    return AdapterCopy(policy, adapter_name) if isinstance(policy, PeftModel) else ModelCopy(policy, shard)


@contextmanager
def with_adapter(policy: nn.Module, adapter_name: str | None) -> Iterator[nn.Module]:
    """
    The policy with another of its adapters, for passes without a gradient.

    Args:
        policy ([`~peft.PeftModel`]):
            Policy, possibly wrapped.
        adapter_name (`str`, *optional*):
            Name of the adapter. `None` switches all adapters off.
    """
    model = extract_model_from_parallel(policy)
    # Only the flags that the layers' forward passes read. peft looks through the whole model before it sets them, and
    # lets go of the gradients of each adapter's weights, which nobody asks for here: a tenth of a step
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, _ADAPTED)]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            if adapter_name is None:
                layer._disable_adapters = True
            else:
                layer._active_adapter = [adapter_name]
        yield policy
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active
