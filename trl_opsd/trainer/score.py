"""What student and teacher say of given completions, as training would have them read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl.trainer.utils import pad

from ..data import prompt_of
from ..scoring import rows_of
from ..signal import TERMS, TokenScores
from .batch import Generation
from .checkpoints import read_state
from .metrics import Metrics
from .rewards import all_feedback, decoded, group_advantages
from .signals import make_streams, shaped_advantages


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
        streams (`dict[str, torch.Tensor]`, *optional*):
            What the parts of the method make of them, see [`~trl_opsd.signal.Signals.streams`]. `None` unless asked
            for.
    """

    student_prompts: list[list[int]]
    teacher_prompts: list[list[int] | None]
    scores: TokenScores
    streams: dict[str, torch.Tensor] | None = None


def score(
    trainer: "SelfDistillationTrainer",
    rows: Sequence[Mapping[str, Any]],
    completion_ids: Sequence[list[int]],
    rewards: torch.Tensor | None = None,
    num_generations: int = 1,
    num_listed: int = 0,
    with_streams: bool = False,
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
            For contexts that read rollouts, and for advantages, of all processes, NaN where a function did not apply.
            `None` for completions of which nothing is known. [`reward`] gives them.
        num_generations (`int`, *optional*, defaults to `1`):
            Completions of a prompt, which follow one another.
        num_listed (`int`, *optional*, defaults to `0`):
            Number of most probable tokens to list on both sides: `scores.listed_tokens` and `listed_log_probs`. They
            are found block by block, as the divergence is.
        with_streams (`bool`, *optional*, defaults to `False`):
            Whether to have the parts of the method write their streams too.

    Returns:
        [`Scored`]: prompts, scores and streams.

    Raises:
        ValueError: If there is a completion without a token, or not one for each row.
    """
    _check_completions(rows, completion_ids)
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
    asked = num_generations, trainer.teacher.annotate, Metrics()
    teacher_prompts = trainer.teacher_inputs.into(batch, generation, *asked, is_training=False)
    scores = _scores(trainer, batch, generation.contrasts, num_listed)
    streams = _streams(trainer, batch, rewards, scores, num_generations) if with_streams else None
    return Scored(student_prompts, teacher_prompts, scores, streams)


def score_rollouts(
    trainer: "SelfDistillationTrainer", batch: dict[str, Any], generation: Generation, rows: list[int], num_listed: int
) -> Scored:
    """
    What [`score`] says of some rollouts of a generation batch, with the streams that they are trained on.

    Args:
        trainer ([`SelfDistillationTrainer`]):
            Trainer that has sampled it.
        batch (`dict[str, Any]`):
            The batch, as [`SelfDistillationTrainer.observers`] are shown it.
        generation ([`Generation`]):
            What it was made of.
        rows (`list[int]`):
            Positions of the rollouts, as many on every process.
        num_listed (`int`):
            See [`score`].
    """
    some = rows_of(batch, rows)
    student, teacher = (
        [ids[mask.bool()].tolist() for ids, mask in zip(some[f"{name}_ids"], some[f"{name}_mask"], strict=True)]
        for name in ("prompt", "teacher_prompt")
    )
    has_context = some["has_context"].tolist()
    contrasts = [generation.contrasts[row] for row in rows] if generation.contrasts else []
    scores = _scores(trainer, some, contrasts, num_listed)
    if "shaped_mask" in some:  # which is left to the loss
        some["advantages"] = shaped_advantages(trainer.signals, trainer.args, some, scores, Metrics().add_rate)
    read = [ids if is_read else None for ids, is_read in zip(teacher, has_context, strict=True)]
    return Scored(student, read, scores, _of_rows(some))


def reward(
    trainer: "SelfDistillationTrainer", rows: Sequence[Mapping[str, Any]], completion_ids: Sequence[list[int]]
) -> torch.Tensor:
    """
    What the trainer's reward functions say of given completions, of which nothing is logged. All processes call this
    at once, with as many rows each.

    Args:
        trainer ([`SelfDistillationTrainer`]):
            Has the reward functions.
        rows (`Sequence[Mapping[str, Any]]`):
            Dataset rows, one for each completion.
        completion_ids (`Sequence[list[int]]`):
            Token ids.

    Returns:
        `torch.Tensor` of shape `(number of all rows, number of reward functions)`: NaN where a function did not apply.
    """
    prompts = [row["prompt"] for row in rows]
    completions = decoded(
        trainer.teacher_prompt.tokenizer, prompts[0], trainer.tokenize_prompts(prompts), completion_ids
    )
    return trainer._unlogged_rewards(list(rows), prompts, completions, list(completion_ids))


def restore(trainer: "SelfDistillationTrainer", checkpoint: Path) -> None:
    """
    Give a trainer what a checkpoint holds, to look at it: the policy's weights, the teacher, what schedules and
    contexts remember. It is not ready to go on with the run.

    Args:
        trainer ([`SelfDistillationTrainer`]):
            As the run was begun with: of its base model and its configuration.
        checkpoint (`Path`):
            The checkpoint.

    Raises:
        ValueError: If it is incomplete, or holds other weights.
    """
    state = read_state(checkpoint)
    trainer._load_from_checkpoint(str(checkpoint))
    if not state["only_model"]:
        trainer.run_state.load(checkpoint, only=("teacher", "schedules", "context"))
    trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    trainer.signals.begin_step(trainer.state.global_step)


def _check_completions(rows: Sequence[Mapping[str, Any]], completion_ids: Sequence[list[int]]) -> None:
    if len(rows) != len(completion_ids):
        raise ValueError(f"`completion_ids` has {len(completion_ids)} completions of {len(rows)} rows. Give one each.")
    for index, ids in enumerate(completion_ids):
        if not ids:
            raise ValueError(f"`completion_ids[{index}]` has no token, and so nothing to score. Leave its row out.")


def _scores(
    trainer: "SelfDistillationTrainer", batch: dict[str, Any], contrasts: list[list[list[int]]], num_listed: int
) -> TokenScores:
    tokens = (batch.get("tool_mask", 1) * batch["completion_mask"]).bool() & batch["has_context"].unsqueeze(1)
    size = trainer.args.per_device_eval_batch_size
    given = {**batch, "divergence_mask": tokens}
    return trainer.loss.scores(trainer.model_wrapped, given, size, Metrics(), contrasts, num_listed)


def _streams(
    trainer: "SelfDistillationTrainer",
    batch: dict[str, Any],
    rewards: torch.Tensor,
    scores: TokenScores,
    num_generations: int,
) -> dict[str, torch.Tensor]:
    accelerator, number = trainer.accelerator, len(batch["completion_ids"])
    how = num_generations, trainer.scale_rewards, trainer.multi_objective_aggregation
    advantages = group_advantages(rewards, trainer.reward_weights, *how)
    batch["advantages"] = advantages[accelerator.process_index * number :][:number]
    given = trainer.signals, trainer.args, batch, (), lambda _: scores, accelerator, num_generations, False, Metrics()
    return _of_rows(make_streams(*given))


def _of_rows(batch: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    names = ("advantages", *(f"{term}_{what}" for term in TERMS for what in ("mask", "weights")))
    return {name: cast(torch.Tensor, batch[name]) for name in names}


def _padded(
    name: str, token_ids: Sequence[list[int]], side: str, pad_token_id: int, device: torch.device
) -> dict[str, Any]:
    tensors = [torch.tensor(ids, device=device) for ids in token_ids]
    masks = [torch.ones_like(ids) for ids in tensors]
    return {f"{name}_ids": pad(tensors, pad_token_id, side), f"{name}_mask": pad(masks, 0, side)}
