from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .base import Teacher
from .copies import AdapterCopy, copy_of, with_adapter


class InitialTeacher(Teacher):
    """
    The policy as training started, the teacher of [OPSD](https://huggingface.co/papers/2601.18734).

    A resumed run is constructed from the same initial policy, so checkpoints hold no copy of a whole model. They hold
    one of an adapter, whose initial weights may be random.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, not yet wrapped.
        adapter_starts_at_zero (`bool`):
            Whether the policy's adapter changes nothing yet, so that switching it off is the initial policy and no
            copy is needed.
        shard (`Callable[[nn.Module], nn.Module]`):
            Wraps a copy for the distributed setup in use.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        adapter_starts_at_zero: bool,
        shard: Callable[[nn.Module], nn.Module],
    ):
        shares_weights = adapter_starts_at_zero and isinstance(policy, PeftModel)
        self._copy = None if shares_weights else copy_of(policy, shard)

    def weights(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        return with_adapter(policy, None) if self._copy is None else self._copy.weights(policy)

    def save(self, directory: Path, is_main_process: bool) -> None:
        if isinstance(self._copy, AdapterCopy):
            self._copy.save(directory, is_main_process)

    def load(self, directory: Path) -> None:
        if isinstance(self._copy, AdapterCopy):
            self._copy.load(directory)
