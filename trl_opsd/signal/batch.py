"""What the parts of a method read: the rollouts of a generation batch, and the scores of their tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """
    Rollouts of this process, as many as every other has.

    Args:
        completion_ids (`torch.Tensor` of shape `(B, T)`):
            Token ids, right-padded, int64.
        mask (`torch.Tensor` of shape `(B, T)`, bool):
            The tokens that the student wrote: no padding, and nothing of a tool or an environment.
        has_context (`torch.Tensor` of shape `(B, 1)`, bool):
            Whether the teacher reads a prompt of its own.
        rewards (`torch.Tensor` of shape `(B, 1)`):
            Weighted sum of the rewards, fp32, NaN where there is none.
        correct (`torch.Tensor` of shape `(B, 1)`, bool):
            Whether the reward reaches `success_threshold`. False where there is none.
        success_rate (`torch.Tensor` of shape `(B, 1)`):
            Share of correct rollouts among those of the same prompt, on all processes, fp32, NaN where there are no
            rewards.
        advantages (`torch.Tensor` of shape `(B, 1)`):
            GRPO's, fp32.
        replaced (`torch.Tensor` of shape `(B, 1)`, bool):
            Whether the completion is another than the student's own rollout of its prompt.
        truncated (`torch.Tensor` of shape `(B, 1)`, bool):
            Whether the completion was cut off before its end.
        spans (`Mapping[str, torch.Tensor]`):
            The tokens that a context marks, bool of shape `(B, T)`, by the kind of what it marks. Empty where it is
            not asked.
        read_prompt_keys (`Callable[[], torch.Tensor]`):
            Gives [`Batch.prompt_keys`].
        max_length (`int`, *optional*):
            Most tokens of a completion, `None` without a limit.
        first (`int`):
            Position of the first of these rollouts among those of all processes.
        is_training (`bool`):
            Whether the batch is trained on, and not evaluated: what a part remembers is of the former alone.
        group (`Callable[[torch.Tensor], torch.Tensor]`):
            From a value of each rollout, of shape `(B, 1)`, to those of all rollouts of the same prompt, on all
            processes, of shape `(B, number of rollouts of a prompt)`. All processes call it at once.
        gather (`Callable[[torch.Tensor], torch.Tensor]`):
            From a tensor of each process, at least one-dimensional and of the same shape in all, to all of them, one
            after the other in the first dimension. All processes call it at once.
        log (`Callable[[str, torch.Tensor, torch.Tensor], None]`):
            Adds to the numerator and the denominator of a rate that is logged, from its name and two scalars. Every
            process gives the same names in the same order.
    """

    completion_ids: torch.Tensor
    mask: torch.Tensor
    has_context: torch.Tensor
    rewards: torch.Tensor
    correct: torch.Tensor
    success_rate: torch.Tensor
    advantages: torch.Tensor
    replaced: torch.Tensor
    truncated: torch.Tensor
    spans: Mapping[str, torch.Tensor]
    read_prompt_keys: Callable[[], torch.Tensor]
    max_length: int | None
    first: int
    is_training: bool
    group: Callable[[torch.Tensor], torch.Tensor]
    gather: Callable[[torch.Tensor], torch.Tensor]
    log: Callable[[str, torch.Tensor, torch.Tensor], None]

    @property
    def prompt_keys(self) -> torch.Tensor:
        """A number for each prompt, int64 of shape `(B, 1)`, the same whenever and wherever its tokens are read."""
        return self.read_prompt_keys()

    def own(self, everything: torch.Tensor) -> torch.Tensor:
        """Of what is there for each rollout of all processes, that of this one's."""
        return everything[self.first : self.first + len(self.mask)]


@dataclass(frozen=True)
class TokenScores:
    """
    What student and teacher say of the tokens of a generation batch, without a gradient, before it is trained on. All
    are fp32 of shape `(B, T)`, in nats, and 0 where nothing is known.

    Args:
        known (`torch.Tensor` of shape `(B, T)`, bool):
            The tokens that both have read: those of [`Batch.mask`] with a context, whose divergence is finite.
        student_log_prob (`torch.Tensor`):
            Log-probability of the sampled token under the student.
        teacher_log_prob (`torch.Tensor`):
            Log-probability of the sampled token under the teacher.
        student_entropy (`torch.Tensor`):
            Entropy of the student's distribution.
        teacher_entropy (`torch.Tensor`):
            Entropy of the teacher's.
        divergence (`torch.Tensor`):
            The divergence that the configuration chooses, of each token.
        contrasted (`torch.Tensor` of shape `(B, T)`, bool, *optional*):
            Those of the known tokens that the teacher has read after other prompts as well, which the context gives
            for contrast. `None` unless a part `needs_contrast`.
        contrast_log_prob (`torch.Tensor`, *optional*):
            Logarithm of the mean of the sampled token's probability over those prompts.
        listed_tokens (`torch.Tensor` of shape `(B, T, 2, k)`, *optional*):
            The most probable tokens under the student and under the teacher, most probable first, int64. `None` unless
            somebody asks for them.
        listed_log_probs (`torch.Tensor` of shape `(B, T, 2, k)`, *optional*):
            Their log-probabilities, −inf where a server has not reported as many.
        teacher_weights (`torch.Tensor`, *optional*):
            What parts that read the teacher in the loss multiply w by, likewise.
    """

    known: torch.Tensor
    student_log_prob: torch.Tensor
    teacher_log_prob: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    divergence: torch.Tensor
    contrasted: torch.Tensor | None = None
    contrast_log_prob: torch.Tensor | None = None
    listed_tokens: torch.Tensor | None = None
    listed_log_probs: torch.Tensor | None = None
    teacher_weights: torch.Tensor | None = None

    @property
    def delta(self) -> torch.Tensor:
        """δ_t = log p_T(y_t) − log p_S(y_t), of shape `(B, T)`."""
        return self.teacher_log_prob - self.student_log_prob
