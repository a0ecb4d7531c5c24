"""Tokens of a pass that differ in their objective, or in their teacher: one call of the fused loss each."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch

from ..objective import FusedDivergence, Head, Objective, Readings, TopLogProbs
from ..teacher import NUMBER, TokenTargets


class TokenGroup(NamedTuple):
    """
    Tokens that go into the fused loss together.

    Args:
        tokens (`torch.Tensor` of shape `(N,)`, bool, *optional*):
            Which of the pass they are, `None` for all.
        states (`torch.Tensor`, [`Readings`] or [`TopLogProbs`], *optional*):
            What the teacher says of them, `None` for nothing.
        head ([`Head`], *optional*):
            The teacher's.
        objective ([`Objective`]):
            Their divergence.
    """

    tokens: torch.Tensor | None
    states: torch.Tensor | Readings | TopLogProbs | None
    head: Head | None
    objective: Objective


def marked_tokens(rows: dict[str, Any], name: str) -> torch.Tensor:
    """The tokens that a batch has under a name, for themselves or for their rows, of shape `(B, T)`, bool."""
    mask = rows["completion_mask"]
    marked = rows[name] if name in rows else torch.zeros_like(mask).bool()  # nobody is asked about spans in a step
    return (marked if marked.dim() == 2 else marked.unsqueeze(1)).expand_as(mask)


def teacher_numbers(rows: dict[str, Any]) -> torch.Tensor:
    """The position of each token's teacher among several, of shape `(B, T)`: 0 where there is one."""
    mask = rows["completion_mask"]
    return rows[NUMBER].unsqueeze(1).expand_as(mask) if NUMBER in rows else torch.zeros_like(mask)


def token_groups(
    inside: torch.Tensor,
    targets: Sequence[TokenTargets],
    counts_others: bool,
    objective: Objective,
    objectives: Sequence[tuple[torch.Tensor, Objective]] = (),
) -> list[TokenGroup]:
    """
    The groups of the tokens of a pass.

    Args:
        inside (`torch.Tensor` of shape `(N,)`, bool):
            Those that the divergence counts.
        targets (`Sequence[TokenTargets]`):
            What the teachers say of those inside, or nothing.
        counts_others (`bool`):
            Whether the likelihood of the others counts.
        objective ([`Objective`]):
            The divergence.
        objectives (`Sequence[tuple[torch.Tensor, Objective]]`, *optional*):
            Tokens that have another, as masks of shape `(N,)`, with theirs.
    """
    if not targets:
        return [TokenGroup(None, None, None, objective)]
    others = [TokenGroup(~inside, None, None, objective)] if counts_others and not inside.all() else []
    groups = []
    # Where all teachers have run, some have no token
    for states, head, tokens in [its for its in targets if its.tokens is None or its.tokens.any()] or targets[:1]:
        own = inside if tokens is None else inside.masked_scatter(inside, tokens)
        marked = [(own & mask, its) for mask, its in objectives if (own & mask).any()]
        if marked:
            assert not isinstance(states, TopLogProbs)  # no server's
            rest = own & ~torch.stack([mask for mask, _ in marked]).any(dim=0)
            for mask, its in [(rest, objective), *marked]:
                groups.append(TokenGroup(mask, states[mask[own]], head, its))
        else:
            is_all = not others and (tokens is None or bool(tokens.all()))
            groups.append(TokenGroup(None if is_all else own, states, head, objective))
    return groups + others


def in_order(
    outputs: Sequence[FusedDivergence], groups: Sequence[TokenGroup], inside: torch.Tensor
) -> FusedDivergence:
    """What the groups with targets say of their tokens, in the order of these."""
    given = [(output, group) for output, group in zip(outputs, groups, strict=True) if group.states is not None]
    if len(given) == 1:
        return given[0][0]
    places = torch.cat([cast(torch.Tensor, group.tokens)[inside].nonzero().flatten() for _, group in given])
    together = joined([output for output, _ in given])
    return FusedDivergence(together.loss, *(values[places.argsort()] for values in together[1:]))


def some_of(output: FusedDivergence, tokens: torch.Tensor | slice) -> FusedDivergence:
    """The loss, and what is said of some of the tokens."""
    return FusedDivergence(output.loss, *(values[tokens] for values in output[1:]))


def joined(outputs: Sequence[FusedDivergence]) -> FusedDivergence:
    """What several say, one after the other, and the sum of their losses, without a gradient."""
    loss = torch.stack([output.loss.detach() for output in outputs]).sum()
    return FusedDivergence(loss, *map(torch.cat, list(zip(*outputs, strict=True))[1:]))
