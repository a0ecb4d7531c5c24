"""The interface every kind of teacher implements."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn


class Teacher(ABC):
    """
    Whose weights read the privileged prompt.

    A teacher hands out the module to run the forward through and, if it keeps weights of its own, says when they
    change and puts them into checkpoints.
    """

    @abstractmethod
    def weights(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        """
        Context manager that yields a module holding the teacher's weights.

        Args:
            policy (`nn.Module`):
                The policy as the trainer calls it, wrapped for DDP, FSDP2 or DeepSpeed. Teachers that share its
                weights yield it.
        """

    def on_step_end(self, step: int) -> None:
        """Called on every process after optimizer step number `step`."""

    def save(self, directory: Path, is_main_process: bool) -> None:
        """Write what a resumed run needs into `directory`. Called on every process."""

    def load(self, directory: Path) -> None:
        """Restore what [`save`] wrote. Called on every process."""
