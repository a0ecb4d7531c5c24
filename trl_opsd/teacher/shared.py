"""Teachers that are the policy itself: no copy, no state."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from .base import Teacher
from .copies import with_adapter


class LiveTeacher(Teacher):
    """The current policy."""

    description = "the student's current weights"

    @contextmanager
    def weights(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield policy


class BaseModelTeacher(Teacher):
    """The policy with its adapter switched off: the initial policy, if the adapter started by changing nothing."""

    description = "the policy as training started"

    def weights(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        return with_adapter(policy, None)
