"""The parts that write the loss's streams: from the configuration, and what they make of a batch."""

from collections.abc import Callable, Collection
from typing import Any, cast

import torch

from ..parts import make_part
from ..signal import (
    ADVANTAGES,
    COEFFICIENTS,
    SCHEDULES,
    TERMS,
    TOKEN_WEIGHTS,
    Advantage,
    Batch,
    PolicyWeighting,
    Schedule,
    Signals,
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
        _check_kind("token_weights", weighting, (TokenWeighting, PolicyWeighting))
    schedules = {}
    for name, given in cast(dict[str, Any], args.schedules or {}).items():
        kwargs = {"kind": "linear", **given}
        schedules[name] = make_part(f"schedules[{name!r}]", kwargs.pop("kind"), kwargs, SCHEDULES)
        _check_kind("schedules", schedules[name], (Schedule,))
    return Signals({name: getattr(args, name) for name in COEFFICIENTS}, advantage, weightings, schedules)


def _check_kind(slot: str, part: Any, bases: tuple[type, ...]) -> None:
    if not isinstance(part, bases):
        names = " or ".join(base.__name__ for base in bases)
        raise ValueError(f"`{slot}` names {type(part).__name__}, which is no subclass of {names}.")


def make_streams(
    signals: Signals,
    batch: dict[str, Any],
    empty_rows: Collection[int],
    score: Callable[[dict[str, Any]], TokenScores],
    gather: Callable[[torch.Tensor], torch.Tensor],
    metrics: Metrics,
    is_sampled_by_student: bool,
) -> dict[str, torch.Tensor | None]:
    """
    What the parts make of a generation batch. All processes call this at once.

    Args:
        signals ([`Signals`]):
            The parts.
        batch (`dict[str, Any]`):
            Generation batch.
        empty_rows (`Collection[int]`):
            Rows without a token of the student's.
        score (`Callable[[dict[str, Any]], TokenScores]`):
            From a batch, whose `divergence_mask` says which tokens, to their scores. Called if a part needs them.
        gather (`Callable[[torch.Tensor], torch.Tensor]`):
            From a tensor of each process to those of all, one after the other in the first dimension.
        metrics ([`Metrics`]):
            Where the share of rows that each term counts goes, and what the parts log.
        is_sampled_by_student (`bool`):
            Whether log-probabilities that a sampler gives are of the distribution that the loss computes.

    Returns:
        `dict[str, torch.Tensor | None]`: see [`Signals.streams`]; besides, the number of rows and tokens, on all
        processes, that the terms count; and, if a part reads them, `old_log_probs` of shape `(B, T)`, under the policy
        that sampled, `None` where that is the student in every loss.
    """
    mask = (batch.get("tool_mask", 1) * batch["completion_mask"]).bool()
    mask[sorted(empty_rows)] = False
    rollouts = Batch(
        batch["completion_ids"],
        mask,
        has_context=batch["has_context"].unsqueeze(1),
        rewards=batch["rewards"].unsqueeze(1),
        correct=batch["correct"].unsqueeze(1) == 1,
        success_rate=batch["success_rate"].unsqueeze(1),
        advantages=batch["advantages"].unsqueeze(1),
        replaced=batch["replaced"].unsqueeze(1),
        truncated=batch["truncated"].unsqueeze(1),
        gather=gather,
        log=metrics.add_rate,
    )
    scores = score({**batch, "divergence_mask": mask & rollouts.has_context}) if signals.needs_scores else None
    streams = signals.streams(rollouts, scores)
    made: dict[str, torch.Tensor | None] = {**streams, **_counts(signals, streams, gather, metrics)}
    if signals.policy_weightings:
        sampled = batch.get("sampling_per_token_logps") if is_sampled_by_student else None
        made["old_log_probs"] = batch.get("old_per_token_logps") if sampled is None else sampled
    return made


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
