"""What the log and the pages tell of the most probable tokens of both sides."""

import math
from collections.abc import Sequence

import torch

from .execution import slices
from .head import Finish
from .support import chunk_maxima, top_k_tokens
from .top_log_probs import TopLogProbs


# Rows whose top k are compared, out of all of a call. It feeds the log alone
NUM_COMPARED = 64
# Rows whose most probable tokens are searched at once, within what blocks of logits leave of the memory
_LISTED_TOGETHER = 16

# A block of products with a head, and what makes logits of them: the student's, the teacher's
Sides = Sequence[tuple[torch.Tensor, Finish]]


class Agreement:
    """
    How far student and teacher agree on the k most probable tokens, on a few evenly spaced rows of a call.

    Args:
        num_rows (`int`):
            Rows N of the call.
        top_k (`int`):
            k, at most the vocabulary.
        dtype (`torch.dtype`):
            Of the logits.
        device (`torch.device`):
            Theirs.
    """

    def __init__(self, num_rows: int, top_k: int, dtype: torch.dtype, device: torch.device) -> None:
        self._top_k, self._every = top_k, max(1, math.ceil(num_rows / NUM_COMPARED))
        compared = math.ceil(num_rows / self._every)
        # The share of the teacher's top k that is among the student's, and the student's logits of the teacher's top k
        # relative to that of the sampled token
        self._overlap = torch.full((compared,), math.nan, dtype=dtype, device=device)
        self._logits = torch.full((compared, top_k), math.nan, dtype=dtype, device=device)

    def compare(self, start: int, part: slice, sides: Sides, token_ids: torch.Tensor) -> None:
        """
        Compares those rows of a part of a block whose turn it is.

        Args:
            start (`int`):
                First row of the block.
            part (`slice`):
                Rows within the block.
            sides (sequence of `tuple[torch.Tensor, Finish]`):
                Student and teacher, products of shape `(block, V)`.
            token_ids (`torch.Tensor` of shape `(N,)` or longer):
                Sampled tokens of the call.
        """
        first = part.start + -(start + part.start) % self._every
        if first >= part.stop:
            return
        rows = slice(first, part.stop, self._every)
        student, teacher = (finish.logits(products[rows]) for products, finish in sides)
        if student.is_cuda:  # where one launch is less than a search in chunks
            student_top, teacher_top = (side.topk(self._top_k, sorted=False).indices for side in (student, teacher))
        else:
            maxima = chunk_maxima(student), chunk_maxima(teacher)
            student_top, teacher_top = top_k_tokens((student, teacher), maxima, self._top_k)
        common = (student_top.unsqueeze(2) == teacher_top.unsqueeze(1)).sum(dim=(1, 2))
        sampled = token_ids[start + first : start + part.stop : self._every].unsqueeze(1)
        index = (start + first) // self._every
        place = slice(index, index + len(student))
        self._overlap[place] = common.to(student.dtype) / self._top_k
        self._logits[place] = student.gather(1, teacher_top) - student.gather(1, sampled)

    def figures(self, log_probs: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What was found.

        Args:
            log_probs (`torch.Tensor` of shape `(N,)`):
                The student's log-probabilities of the sampled tokens, at the temperature.
            temperature (`float`):
                What logits are divided by.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the share of the teacher's top k that is among the student's, and the
            probability that the student gives to the teacher's top k, both of shape `(N,)` and NaN for rows that were
            not compared.
        """
        figures = log_probs.new_full((2, len(log_probs)), math.nan)
        figures[0, :: self._every] = self._overlap
        compared = self._logits / temperature + log_probs[:: self._every].unsqueeze(1)
        figures[1, :: self._every] = compared.exp().sum(dim=-1)
        overlap, mass = figures.unbind(0)
        return overlap, mass


class Listed:
    """
    The most probable tokens of both sides, most probable first.

    Args:
        num_rows (`int`):
            Rows N of the call.
        num_listed (`int`):
            Tokens of each row, at most the vocabulary.
        dtype (`torch.dtype`):
            Of the logits.
        device (`torch.device`):
            Theirs.

    Attributes:
        tokens (`torch.Tensor` of shape `(N, 2, num_listed)`):
            The tokens under the student and under the teacher, int64.
        log_probs (`torch.Tensor` of shape `(N, 2, num_listed)`):
            Their log-probabilities, −inf where a server has not reported as many.
    """

    def __init__(self, num_rows: int, num_listed: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = num_rows, 2, num_listed
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.log_probs = torch.full(shape, -torch.inf, dtype=dtype, device=device)

    def fill(self, start: int, part: slice, sides: Sides, temperature: float, teacher: object) -> None:
        """
        Lists the tokens of a part of a block.

        Args:
            start (`int`):
                First row of the block.
            part (`slice`):
                Rows within the block.
            sides (sequence of `tuple[torch.Tensor, Finish]`):
                Student and teacher, products of shape `(block, V)`.
            temperature (`float`):
                What logits are divided by.
            teacher (`object`):
                The teacher's states: of [`TopLogProbs`] no more are known than they hold.
        """
        for side, (products, finish) in enumerate(sides):
            k = self.tokens.size(2)
            if side == 1 and isinstance(teacher, TopLogProbs):
                k = min(k, teacher.top_tokens.size(1))
            for some in slices(part.stop - part.start, _LISTED_TOGETHER):
                within = slice(part.start + some.start, part.start + some.stop)
                logits = finish.logits(products[within])
                (tokens,) = top_k_tokens([logits], [chunk_maxima(logits)], k)
                top = (logits.gather(1, tokens) / temperature).sort(dim=1, descending=True)
                rows = slice(start + within.start, start + within.stop)
                self.tokens[rows, side, :k] = tokens.gather(1, top.indices)
                total = (logits / temperature).logsumexp(dim=1, keepdim=True)
                self.log_probs[rows, side, :k] = top.values - total
