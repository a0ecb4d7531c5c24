from contextlib import AbstractContextManager

from torch import nn

from .base import Teacher


class ServedTeacher(Teacher):
    """A model that only a server holds, which scores the rollouts as soon as they are sampled."""

    def weights(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        raise RuntimeError("The teacher's weights are on a server.")
