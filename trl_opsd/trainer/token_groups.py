"""Tokens of a pass that differ in their objective, or in having a teacher: one call of the fused loss each."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch

from ..objective import FusedDivergence, Head, Objective, Readings, TopLogProbs


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


def replaced_tokens(rows: dict[str, Any]) -> torch.Tensor:
    """The tokens of completions that took the place of rollouts, of shape `(B, T)`, bool."""
    return rows["replaced"].unsqueeze(1).expand_as(rows["completion_mask"])


def token_groups(
    inside: torch.Tensor,
    replaced: torch.Tensor,
    targets: tuple[torch.Tensor | Readings | TopLogProbs | None, Head | None],
    counts_others: bool,
    objective: Objective,
    replaced_objective: Objective | None,
) -> list[TokenGroup]:
    """
    The groups of the tokens of a pass.

    Args:
        inside (`torch.Tensor` of shape `(N,)`, bool):
            Those that the divergence counts.
        replaced (`torch.Tensor` of shape `(N,)`, bool):
            Those of completions that took the place of rollouts.
        targets (`tuple`):
            What the teacher says of those inside, and its head.
        counts_others (`bool`):
            Whether the likelihood of the others counts.
        objective ([`Objective`]):
            The divergence.
        replaced_objective ([`Objective`], *optional*):
            That of replaced completions, if it is another.
    """
    states, head = targets
    if states is None:
        return [TokenGroup(None, None, None, objective)]
    others = [TokenGroup(~inside, None, None, objective)] if counts_others and not inside.all() else []
    if replaced_objective is not None and (replaced & inside).any():
        assert not isinstance(states, TopLogProbs)  # no server's
        own = TokenGroup(inside & ~replaced, states[~replaced[inside]], head, objective)
        return [own, TokenGroup(inside & replaced, states[replaced[inside]], head, replaced_objective), *others]
    return [TokenGroup(inside if others else None, states, head, objective), *others]


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


def none_of(output: FusedDivergence) -> FusedDivergence:
    """Its loss, and what it says of no token."""
    return FusedDivergence(output.loss, *(values[:0] for values in output[1:]))


def joined(outputs: Sequence[FusedDivergence]) -> FusedDivergence:
    """What several say, one after the other, and the sum of their losses, without a gradient."""
    loss = torch.stack([output.loss.detach() for output in outputs]).sum()
    return FusedDivergence(loss, *map(torch.cat, list(zip(*outputs, strict=True))[1:]))
