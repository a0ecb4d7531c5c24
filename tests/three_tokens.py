"""The three tokens whose exact values are known: p_S = (.6, .3, .1), p_T = (.2, .5, .3)."""

import torch

from trl_opsd.signal import Batch, TokenScores


P_S, P_T = (0.6, 0.3, 0.1), (0.2, 0.5, 0.3)


def make_scores(p_s=P_S, p_t=P_T, known=(True, True, True), divergence=0.0):
    """A completion of three tokens: the first, the second and the third of the vocabulary, each at p_S and p_T."""
    log_s, log_t = (torch.tensor([p]).log() for p in (p_s, p_t))
    known = torch.tensor([known])
    entropies = (-(torch.tensor(p) * torch.tensor(p).log()).sum().expand(1, 3) for p in (p_s, p_t))
    values = (log_s, log_t, *entropies, torch.full((1, 3), divergence))
    return TokenScores(known, *(value.where(known, 0.0) for value in values))


def advantages_of(part, advantage, scores, correct=True):
    column = torch.tensor([[correct]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    batch = Batch(torch.tensor([[0, 1, 2]]), mask, torch.tensor([[True]]), column.float(), column, column.float())
    return part(torch.tensor([[advantage]]), batch, scores).expand(1, 3)
