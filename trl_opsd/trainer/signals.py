"""The parts that write the loss's streams: from the configuration, and what they make of a batch."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from ..parts import make_part
from ..scoring import Images
from ..signal import (
    ADVANTAGES,
    COEFFICIENTS,
    CURRICULA,
    SCHEDULES,
    TERMS,
    TOKEN_WEIGHTS,
    Advantage,
    Batch,
    Curriculum,
    PolicyWeighting,
    Schedule,
    Signals,
    Target,
    TeacherWeighting,
    TokenScores,
    TokenWeighting,
)
from .config import SelfDistillationConfig
from .metrics import Metrics


def make_signals(args: SelfDistillationConfig) -> Signals:
    """
    The parts that a configuration names.

    Raises:
        ValueError: If there is no such part, if its arguments do not fit, or if it is none of its slot.
    """
    advantage = make_part("advantage", args.advantage, cast(Any, args.advantage_kwargs), ADVANTAGES)
    _check_kind("advantage", advantage, (Advantage,))
    weightings = {
        name: make_part("token_weights", name, kwargs, TOKEN_WEIGHTS)
        for name, kwargs in cast(dict[str, Any], args.token_weights or {}).items()
    }
    for weighting in weightings.values():
        _check_kind("token_weights", weighting, (TokenWeighting, PolicyWeighting, TeacherWeighting))
    schedules = {}
    for name, given in cast(dict[str, Any], args.schedules or {}).items():
        kwargs = {"kind": "linear", **given}
        schedules[name] = make_part(f"schedules[{name!r}]", kwargs.pop("kind"), kwargs, SCHEDULES)
        _check_kind("schedules", schedules[name], (Schedule,))
    curriculum = None
    if args.curriculum is not None:
        curriculum = make_part("curriculum", args.curriculum, cast(Any, args.curriculum_kwargs), CURRICULA)
        _check_kind("curriculum", curriculum, (Curriculum,))
    target = None
    if args.target is not None:
        target = make_part("target", args.target, cast(Any, args.target_kwargs), {})
        _check_kind("target", target, (Target,))
    coefficients = {name: getattr(args, name) for name in COEFFICIENTS}
    return Signals(coefficients, advantage, weightings, schedules, curriculum, target)


def _check_kind(slot: str, part: Any, bases: tuple[type, ...]) -> None:
    if not isinstance(part, bases):
        names = " or ".join(base.__name__ for base in bases)
        raise ValueError(f"`{slot}` names {type(part).__name__}, which is no subclass of {names}.")


def make_streams(
    signals: Signals,
    args: SelfDistillationConfig,
    batch: dict[str, Any],
    empty_rows: Collection[int],
    score: Callable[[dict[str, Any]], TokenScores],
    accelerator: Accelerator,
    num_generations: int,
    is_training: bool,
    metrics: Metrics,
    shapes_in_loss: bool = False,
) -> dict[str, torch.Tensor | None]:
    """
    What the parts make of a generation batch. All processes call this at once.

    Args:
        signals ([`Signals`]):
            The parts.
        args ([`SelfDistillationConfig`]):
            Configuration.
        batch (`dict[str, Any]`):
            Generation batch.
        empty_rows (`Collection[int]`):
            Rows without a token of the student's.
        score (`Callable[[dict[str, Any]], TokenScores]`):
            From a batch, whose `divergence_mask` says which tokens, to their scores. Called if a part needs them.
        accelerator ([`~accelerate.Accelerator`]):
            The processes.
        num_generations (`int`):
            Rollouts of a prompt.
        is_training (`bool`):
            Whether the rollouts are trained on.
        metrics ([`Metrics`]):
            Where the share of rows that each term counts goes, and what the parts log.
        shapes_in_loss (`bool`, *optional*, defaults to `False`):
            Whether the policy in the loss is the one that sampled, and an advantage may be asked there.

    Returns:
        `dict[str, torch.Tensor | None]`: see [`Signals.streams`]; besides, the number of rows and tokens, on all
        processes, that the terms count; and, if a part reads them, `old_log_probs` of shape `(B, T)`, under the policy
        that sampled, `None` where that is the student in every loss; and `shaped_mask` of shape `(B, T)`, the tokens
        of rollouts, if the advantages are shaped in the loss.
    """
    rollouts = _rollouts(args, batch, empty_rows, accelerator, num_generations, is_training, metrics)
    mask = rollouts.mask & rollouts.has_context
    shapes_in_loss = shapes_in_loss and signals.can_shape_in_loss
    is_scored = signals.needs_scores and not shapes_in_loss
    scores = score({**batch, "divergence_mask": mask}) if is_scored else None
    streams = signals.streams(rollouts, scores, shapes_in_loss)
    counts = _counts(signals, streams, rollouts.gather, metrics)
    made: dict[str, torch.Tensor | None] = {**streams, **counts}
    if shapes_in_loss:
        made["shaped_mask"] = rollouts.mask
    if signals.policy_weightings:
        sampled = batch.get("sampling_per_token_logps") if args.sampler_is_comparable else None
        made["old_log_probs"] = batch.get("old_per_token_logps") if sampled is None else sampled
    return made


def has_one_update(args: SelfDistillationConfig) -> bool:
    """Whether the policy stays as it is from where a generation is sampled to its last micro-batch."""
    return args.gradient_accumulation_steps % (cast(int, args.steps_per_generation) * args.num_iterations) == 0


def may_shape_in_loss(args: SelfDistillationConfig, shares_pass: bool, policy: nn.Module) -> bool:
    """
    Whether the student that the loss reads says what it said when it sampled, so that advantages may be shaped there.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration.
        shares_pass (`bool`):
            Whether GRPO's loss takes the student's pass that is there.
        policy (`nn.Module`):
            Policy, not wrapped, in the mode that it samples in.
    """
    if not policy.training or not has_one_update(args):
        return False
    rates = (
        getattr(its, "p", 0.0) if isinstance(its, nn.Dropout) else getattr(its, "attention_dropout", 0.0)
        for its in policy.modules()
    )
    return shares_pass and not any(isinstance(rate, float) and rate for rate in rates)


def shaped_advantages(
    signals: Signals,
    args: SelfDistillationConfig,
    rows: dict[str, Any],
    scores: TokenScores,
    log: Callable[[str, torch.Tensor, torch.Tensor], None],
) -> torch.Tensor:
    """
    The advantages of some rows, in the loss.

    Args:
        signals ([`Signals`]):
            The parts.
        args ([`SelfDistillationConfig`]):
            Configuration.
        rows (`dict[str, Any]`):
            The rows, with the `shaped_mask` that [`make_streams`] made.
        scores ([`TokenScores`]):
            Of their tokens.
        log (`Callable[[str, torch.Tensor, torch.Tensor], None]`):
            Adds to a rate that is logged.

    Raises:
        ValueError: If the advantage asks for other rollouts.
    """
    return signals.shaped(_batch(args, rows, rows["shaped_mask"], 0, True, _alone, _alone, log), scores)


def _alone(values: torch.Tensor) -> Any:
    raise ValueError("`advantage` says that it `reads_own_rollout`, and asks for others. Leave that False.")


def _rollouts(
    args: SelfDistillationConfig,
    batch: dict[str, Any],
    empty_rows: Collection[int],
    accelerator: Accelerator,
    num_generations: int,
    is_training: bool,
    metrics: Metrics,
) -> Batch:
    mask = (batch.get("tool_mask", 1) * batch["completion_mask"]).bool()
    mask[sorted(empty_rows)] = False
    first = accelerator.process_index * len(mask)
    group = partial(_of_the_group, accelerator.gather, accelerator.process_index, num_generations)
    return _batch(args, batch, mask, first, is_training, group, accelerator.gather, metrics.add_rate)


def _batch(
    args: SelfDistillationConfig,
    batch: dict[str, Any],
    mask: torch.Tensor,
    first: int,
    is_training: bool,
    group: Callable[[torch.Tensor], torch.Tensor],
    gather: Callable[[torch.Tensor], torch.Tensor],
    log: Callable[[str, torch.Tensor, torch.Tensor], None],
) -> Batch:
    return Batch(
        batch["completion_ids"],
        mask,
        has_context=batch["has_context"].unsqueeze(1),
        rewards=batch["rewards"].unsqueeze(1),
        correct=batch["correct"].unsqueeze(1) == 1,
        success_rate=batch["success_rate"].unsqueeze(1),
        advantages=batch["advantages"].unsqueeze(1),
        replaced=batch["replaced"].unsqueeze(1),
        truncated=batch["truncated"].unsqueeze(1),
        spans={name.partition("/")[2]: mask for name, mask in batch.items() if name.startswith("spans/")},
        read_prompt_keys=cache(partial(prompt_keys, batch["prompt_ids"], batch["prompt_mask"], batch.get("images"))),
        max_length=args.max_completion_length,
        first=first,
        is_training=is_training,
        group=group,
        gather=gather,
        log=log,
    )


def prompt_keys(
    prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, images: Sequence[Images] | None = None
) -> torch.Tensor:
    """
    What tells prompts from one another.

    Args:
        prompt_ids (`torch.Tensor` of shape `(B, T)`):
            Token ids.
        prompt_mask (`torch.Tensor` of shape `(B, T)`):
            1 for those that are no padding.
        images (`Sequence[Images]`, *optional*):
            Images of each prompt.

    Returns:
        `torch.Tensor` of shape `(B, 1)`, int64: a number that these ids and images decide, whatever the padding.
    """
    numbered = cache(lambda row: prompt_key(list(row)))  # once for a group
    keys = []
    for ids, mask, its in zip(prompt_ids, prompt_mask.bool(), images or [{}] * len(prompt_ids), strict=True):
        sums = [f"{values.double().sum():.6g} {values.double().square().sum():.6g}" for values in its.values()]
        keys.append(numbered((*ids[mask].tolist(), *sums)))
    return torch.tensor(keys, device=prompt_ids.device).view(-1, 1)


def prompt_key(parts: list[Any]) -> int:
    """The number of one prompt, from its token ids and what tells its images, from 0 to 2^63 - 1."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1


def _of_the_group(
    gather: Callable[[torch.Tensor], torch.Tensor], process_index: int, num_generations: int, values: torch.Tensor
) -> torch.Tensor:
    groups = gather(values).view(-1, num_generations).repeat_interleave(num_generations, dim=0)
    return groups[process_index * len(values) :][: len(values)]


def _counts(
    signals: Signals,
    streams: dict[str, torch.Tensor],
    gather: Callable[[torch.Tensor], torch.Tensor],
    metrics: Metrics,
) -> dict[str, torch.Tensor]:
    counts: dict[str, torch.Tensor] = {}
    for term in TERMS:
        rows = streams[f"{term}_mask"].any(dim=1)
        counts |= {f"num_{term}_rows": rows.sum(), f"num_{term}_tokens": streams[f"{term}_mask"].sum()}
        if signals.coefficients[f"{term}_coef"]:
            metrics.add_rate(f"{term}_row_rate", rows.sum(), torch.ones_like(rows).sum())
    totals = gather(torch.stack(list(counts.values())).float().unsqueeze(0)).sum(dim=0)
    return dict(zip(counts, totals, strict=True))
