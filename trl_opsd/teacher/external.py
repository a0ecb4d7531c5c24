from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from .base import Teacher


class ExternalTeacher(Teacher):
    """
    Another model, never trained. It is no part of checkpoints: a resumed run loads it again.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The teacher, over the policy's vocabulary. Its width, depth and quantisation are its own, and its dtype
            too, unless DeepSpeed casts it with the rest.
        shard (`Callable[[nn.Module], nn.Module]`):
            Wraps it for the distributed setup in use.
    """

    def __init__(self, model: PreTrainedModel, shard: Callable[[nn.Module], nn.Module]):
        self._wrapped = shard(model.requires_grad_(False).eval())

    @contextmanager
    def weights(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield self._wrapped
