"""What student and teacher say of given completions, as training would have them read."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from trl.trainer.utils import pad

from ..data import prompt_of
from ..signal import TokenScores
from .batch import Generation
from .metrics import Metrics
from .rewards import all_feedback, decoded


if TYPE_CHECKING:
    from .trainer import SelfDistillationTrainer


class Scored(NamedTuple):
    """
    Completions and their scores.

    Args:
        student_prompts (`list[list[int]]`):
            Token ids of what the student reads.
        teacher_prompts (`list[list[int] | None]`):
            Token ids of what the teacher reads, `None` for rows without a context.
        scores ([`TokenScores`]):
            Of shape `(B, T)`. Nothing is known of rows without a context.
    """

    student_prompts: list[list[int]]
    teacher_prompts: list[list[int] | None]
    scores: TokenScores


def score(
    trainer: "SelfDistillationTrainer",
    rows: Sequence[Mapping[str, Any]],
    completion_ids: Sequence[list[int]],
    rewards: torch.Tensor | None = None,
    num_generations: int = 1,
) -> Scored:
    """
    Scores given completions, under the current weights of student and teacher and without a gradient. Nothing of the
    run changes. All processes call this at once, with as many rows each.

    Args:
        trainer ([`SelfDistillationTrainer`]):
            Its policy, its teacher, its privileged context and its divergence are used.
        rows (`Sequence[Mapping[str, Any]]`):
            Dataset rows, one for each completion.
        completion_ids (`Sequence[list[int]]`):
            Token ids, at least one each, the token that ends a completion included.
        rewards (`torch.Tensor` of shape `(number of all rows, number of reward functions)`, *optional*):
            For contexts that read rollouts, of all processes, NaN where a function did not apply. `None` for
            completions of which nothing is known.
        num_generations (`int`, *optional*, defaults to `1`):
            Completions of a prompt, which follow one another.

    Returns:
        [`Scored`]: prompts and scores.

    Raises:
        ValueError: If there is a completion without a token, or not one for each row.
    """
    if len(rows) != len(completion_ids):
        raise ValueError(f"`completion_ids` has {len(completion_ids)} completions of {len(rows)} rows. Give one each.")
    for index, ids in enumerate(completion_ids):
        if not ids:
            raise ValueError(f"`completion_ids[{index}]` has no token, and so nothing to score. Leave its row out.")
    accelerator, tokenizer = trainer.accelerator, trainer.teacher_prompt.tokenizer
    if rewards is None:
        shape = len(rows) * accelerator.num_processes, len(trainer.reward_funcs)
        rewards = torch.full(shape, torch.nan, device=accelerator.device)
    prompts = [prompt_of(row) for row in rows]
    student_prompts = trainer.tokenize_prompts(prompts)
    generation = Generation(
        rows=list(rows),
        completions=decoded(tokenizer, prompts[0], student_prompts, completion_ids),
        token_ids=list(completion_ids),
        rewards=rewards,
        feedback=all_feedback(None, None, rows),
        tools=[trainer.tools] * len(rows),
    )
    batch = _padded("prompt", student_prompts, "left", tokenizer.pad_token_id, accelerator.device)
    batch["images"] = [trainer.teacher_prompt.student_images(prompt, trainer.tools) for prompt in prompts]
    batch |= _padded("completion", completion_ids, "right", tokenizer.pad_token_id, accelerator.device)
    teacher_prompts = trainer.teacher_inputs.into(
        batch, generation, num_generations, trainer.teacher.annotate, Metrics(), is_training=False
    )
    batch["divergence_mask"] = batch["completion_mask"].bool() & batch["has_context"].unsqueeze(1)
    size = trainer.args.per_device_eval_batch_size
    scores = trainer.loss.scores(trainer.model_wrapped, batch, size, Metrics(), generation.contrasts)
    return Scored(student_prompts, teacher_prompts, scores)


def _padded(
    name: str, token_ids: Sequence[list[int]], side: str, pad_token_id: int, device: torch.device
) -> dict[str, Any]:
    tensors = [torch.tensor(ids, device=device) for ids in token_ids]
    masks = [torch.ones_like(ids) for ids in tensors]
    return {f"{name}_ids": pad(tensors, pad_token_id, side), f"{name}_mask": pad(masks, 0, side)}
