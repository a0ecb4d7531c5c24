"""What the student is pulled to, where that is more than what the teacher says after its prompt."""

from abc import ABC, abstractmethod

import torch


class Target(ABC):
    """
    A distribution that is made of what the teacher says of a token after three prompts: its own, the student's, and
    the one that the context gives for contrast. It takes the teacher's place in the divergence and in all that is said
    of it. It costs two more passes of the teacher, and as many products with its head.
    """

    @abstractmethod
    def __call__(self, teacher: torch.Tensor, plain: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
        """
        The target.

        Args:
            teacher (`torch.Tensor` of shape `(N, V)`):
                Log-probabilities after the teacher's prompt, fp32, at the temperature of the divergence.
            plain (`torch.Tensor` of shape `(N, V)`):
                After the student's prompt.
            contrast (`torch.Tensor` of shape `(N, V)`):
                After the prompt that is there for contrast.

        Returns:
            `torch.Tensor` of shape `(N, V)`: logits, whose softmax is the target.
        """
