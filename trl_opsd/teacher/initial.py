from collections.abc import Callable
from contextlib import AbstractContextManager

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .base import Teacher
from .copies import copy_of, without_adapter


class InitialTeacher(Teacher):
    """
    The policy as training started, the teacher of [OPSD](https://huggingface.co/papers/2601.18734).

    Nothing is stored in checkpoints: a resumed run is constructed from the same initial policy.

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
        share = adapter_starts_at_zero and isinstance(policy, PeftModel)
        self._weights = without_adapter if share else copy_of(policy, shard).weights

    def weights(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        return self._weights(policy)
