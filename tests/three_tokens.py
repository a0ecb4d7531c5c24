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


def make_batch(mask, spans=None, **given):
    """
    Rollouts of one process, of shape `(B, T)` as the mask is. Unless something else is given (one value for each row,
    or for all), they are correct, with a context, and the student's own to their end, in groups of `group_size`.
    """
    of_all = {"max_length": 10, "is_training": True, "first": 0, "gather": lambda own: own, "log": lambda *rate: None}
    of_all |= {name: given.pop(name) for name in of_all.keys() & given.keys()}
    size, column = given.pop("group_size", len(mask)), torch.zeros(len(mask), 1)

    def group(values):
        return values.reshape(-1, size).repeat_interleave(size, dim=0)

    values = {"correct": True, "has_context": True, "replaced": False, "truncated": False, "advantages": 1.0} | given
    values = {"rewards": torch.as_tensor(values["correct"]).float()} | values
    columns = {name: torch.as_tensor(value).view(-1, 1).expand_as(column) for name, value in values.items()}
    columns = {"success_rate": group(columns["rewards"]).mean(1, keepdim=True)} | columns
    keys = columns.pop("prompt_keys", (torch.arange(len(mask)) // size).view(-1, 1))
    ids = torch.ones_like(mask, dtype=torch.int64)
    return Batch(ids, mask, **columns, spans=spans or {}, read_prompt_keys=lambda: keys, **of_all, group=group)


def advantages_of(part, advantage, scores, correct=True):
    mask = torch.ones(1, 3, dtype=torch.bool)
    return part(make_batch(mask, advantages=advantage, correct=correct), scores).expand(1, 3)
