"""Which completions are trained on: the student's own rollouts, or what takes the place of some of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np


TokenIds = list[int]
LogProbs = list[float | None]


@dataclass
class Completions:
    """
    A completion of each prompt.

    Args:
        ids (`list[list[int]]`):
            Token ids.
        log_probs (`list[list[float | None]]`, *optional*):
            What the sampler reports of each token; `None` for tokens that it did not sample. `None` altogether from a
            sampler that reports nothing.
        replaced (`set[int]`, *optional*):
            Rows whose completion is not the student's own, sampled from its own prompt.
        rates (`dict[str, tuple[int, int]]`, *optional*):
            Rates to log, as numerator and denominator. Every process gives the same names in the same order.
    """

    ids: list[TokenIds]
    log_probs: list[LogProbs] | None = None
    replaced: set[int] = field(default_factory=set)
    rates: dict[str, tuple[int, int]] = field(default_factory=dict)

    def replace(self, row: int, ids: TokenIds) -> None:
        """Put another completion into a row."""
        self.ids[row] = ids
        self.replaced.add(row)
        if self.log_probs is not None:
            # A token without a log-probability gets an importance ratio of 1
            self.log_probs[row] = [None] * len(ids)


@dataclass(frozen=True)
class Prompts:
    """
    The prompts of one process that are to be completed, and what completes them.

    All processes call each function equally often, each with as many rows as it likes: what they need to have in
    common is taken care of.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            Dataset rows, one for each completion.
        step (`int`):
            Optimizer steps done.
        seed (`int`):
            Seed of the run.
        process_index (`int`):
            Number of the process.
        rollouts (`Callable[[], Completions]`):
            The student's own, for all rows.
        some_rollouts (`Callable[[Sequence[int]], Completions]`):
            The student's own for some rows, by their indices.
        sample (`Callable[[Sequence[list[int]]], list[list[int]]]`):
            Completions of any prompts by the student, sampled as its rollouts are.
        sample_teacher (`Callable[[Sequence[list[int]]], list[list[int]]]`):
            Completions of any prompts by the teacher, sampled as rollouts are or by `teacher_sampling`.
        teacher_prompt (`Callable[[int], list[int] | None]`):
            Token ids of what the teacher reads for a row, `None` if it has no context.
        prompt_with (`Callable[[int, Any], list[int] | None]`):
            Token ids of what it would read for a row by another [`~trl_opsd.context.PrivilegedContext`], `None` if
            there is none, or if it would be too long.
        share_in_top_k (`Callable[[Sequence[int], Sequence[list[int]], int], list[float]]`):
            The share of the tokens of completions of some rows, by their indices, that are among the k tokens which
            the student, reading them, finds most probable.
        encode (`Callable[[str | list[dict[str, Any]]], list[int]]`):
            Token ids of a completion that is text or messages, with the token that ends it.
        grade (`Callable[[Sequence[int], Sequence[list[int]]], list[bool | None]]`):
            Whether completions of some rows, by their indices, are right by the reward functions. `None` where none
            applies.
        group (`Callable[[Sequence[Any]], list[list[Any]]]`):
            From a value of each row to those of all rollouts of the same prompt, on all processes.
    """

    rows: Sequence[Mapping[str, Any]]
    step: int
    seed: int
    process_index: int
    rollouts: Callable[[], Completions]
    some_rollouts: Callable[[Sequence[int]], Completions]
    sample: Callable[[Sequence[TokenIds]], list[TokenIds]]
    sample_teacher: Callable[[Sequence[TokenIds]], list[TokenIds]]
    teacher_prompt: Callable[[int], TokenIds | None]
    prompt_with: Callable[[int, Any], TokenIds | None]
    share_in_top_k: Callable[[Sequence[int], Sequence[TokenIds], int], list[float]]
    encode: Callable[[Any], TokenIds]
    grade: Callable[[Sequence[int], Sequence[TokenIds]], list[bool | None]]
    group: Callable[[Sequence[Any]], list[list[Any]]]


class CompletionSource(ABC):
    """
    Gives the completions that are trained on. Evaluation is always on the student's own rollouts.

    Write a subclass in any importable module and name it in `completions`.
    """

    columns: tuple[str, ...] = ()
    """Dataset columns it reads."""
    replaces_rollouts = True
    """Whether completions may be others than the student's own rollouts."""
    needs_rewards = False
    """Whether it grades."""
    needs_context = False
    """Whether it reads the teacher's prompt, which there is no rollout for yet."""
    samples_teacher = False
    """Whether it samples from the teacher's weights."""
    teacher_sampling: Mapping[str, Any] = MappingProxyType({})
    """How it does, where that is not how rollouts are sampled: `temperature`, `top_p` and `top_k`."""
    group_size = 1
    """What the rollouts of a prompt are a multiple of."""

    @property
    def description(self) -> str:
        """What it does, in the words that follow the number of rollouts where a run is introduced."""
        return f"completions of {type(self).__name__}"

    @abstractmethod
    def __call__(self, prompts: Prompts) -> Completions:
        """
        Complete the prompts of this process.

        Args:
            prompts ([`Prompts`]):
                Prompts and what completes them.
        """


class OnPolicy(CompletionSource):
    """The student's own rollouts."""

    replaces_rollouts = False
    description = ""

    def __call__(self, prompts: Prompts) -> Completions:
        return prompts.rollouts()


class _Mixture(CompletionSource):
    """
    A share of on-policy sequences, as in [`~trl.experimental.gkd.GKDConfig`], drawn for each generation batch.

    Args:
        lmbda (`float`, *optional*, defaults to `0.0`):
            Share of on-policy sequences, in [0, 1).
    """

    def __init__(self, lmbda: float = 0.0):
        if not 0.0 <= lmbda < 1.0:
            raise ValueError(
                f"`lmbda` of `completions_kwargs` must be in [0, 1), got {lmbda}. It is the share of on-policy "
                "sequences: for all of them, set `completions='on_policy'`."
            )
        self.lmbda = lmbda

    @abstractmethod
    def _others(self, prompts: Prompts, rows: list[int]) -> dict[int, TokenIds]:
        """Completions in the place of rollouts of some rows, by row."""

    def __call__(self, prompts: Prompts) -> Completions:
        # The number is the same on every process; which rows is not
        num_rows = len(prompts.rows)
        shared = np.random.default_rng([prompts.seed, prompts.step])
        own = np.random.default_rng([prompts.seed, prompts.step, prompts.process_index + 1])
        num_on_policy = int(self.lmbda * num_rows + shared.random())
        return mixed(prompts, self._others(prompts, sorted(own.permutation(num_rows)[num_on_policy:].tolist())))


def mixed(prompts: Prompts, others: Mapping[int, TokenIds]) -> Completions:
    """
    Completions of which some are not the student's.

    Args:
        prompts ([`Prompts`]):
            Prompts and what completes them.
        others (`Mapping[int, list[int]]`):
            Token ids of those, by row.

    Returns:
        [`Completions`]: these, and rollouts of the student in all other rows.
    """
    on_policy = [row for row in range(len(prompts.rows)) if row not in others]
    sampled = prompts.some_rollouts(on_policy)
    completions = Completions([[] for _ in prompts.rows])
    if sampled.log_probs is not None:
        completions.log_probs = [[] for _ in prompts.rows]
    for position, row in enumerate(on_policy):
        completions.ids[row] = sampled.ids[position]
        if completions.log_probs is not None and sampled.log_probs is not None:
            completions.log_probs[row] = sampled.log_probs[position]
    for row, ids in others.items():
        completions.replace(row, ids)
    return completions


def teacher_prompts(teacher_prompt: Callable[[int], TokenIds | None], rows: Iterable[int]) -> dict[int, TokenIds]:
    """What the teacher reads for some rows, by row; nothing for those without a context."""
    read = {row: teacher_prompt(row) for row in rows}
    return {row: ids for row, ids in read.items() if ids is not None}


class FromDataset(_Mixture):
    """
    The dataset's `completion` column, text or messages, for all but a share of on-policy sequences.

    Args:
        lmbda (`float`, *optional*, defaults to `0.0`):
            Share of on-policy sequences, in [0, 1).
    """

    columns = ("completion",)

    @property
    def description(self) -> str:
        return f"{1 - self.lmbda:.0%} of the sequences come from the dataset instead"

    def _others(self, prompts: Prompts, rows: list[int]) -> dict[int, TokenIds]:
        return {row: prompts.encode(prompts.rows[row]["completion"]) for row in rows}


class FromTeacher(_Mixture):
    """
    Samples of the privileged teacher, GKD's `seq_kd`, for all but a share of on-policy sequences. A row without a
    context stays on-policy.

    Args:
        lmbda (`float`, *optional*, defaults to `0.0`):
            Share of on-policy sequences, in [0, 1).
    """

    needs_context = True
    samples_teacher = True

    @property
    def description(self) -> str:
        return f"{1 - self.lmbda:.0%} of the sequences come from the teacher instead"

    def _others(self, prompts: Prompts, rows: list[int]) -> dict[int, TokenIds]:
        given = teacher_prompts(prompts.teacher_prompt, rows)
        return dict(zip(given, prompts.sample_teacher(list(given.values())), strict=True))


class HintedRetry(CompletionSource):
    """
    The rationalization of [STaR](https://huggingface.co/papers/2203.14465): the student gets another try at what it
    got wrong, reading the privileged context. A right retry takes the place of the wrong rollout, as an answer to the
    bare prompt; after a wrong one, the rollout stays.

    A rollout is wrong if its reward is below `success_threshold`; one to which no reward function applies is neither.
    Rewards are computed twice for wrong rollouts and their retries: here, and for the whole batch as always.
    """

    needs_rewards = True
    needs_context = True
    description = "wrong ones are tried again with the privileged context"

    def __call__(self, prompts: Prompts) -> Completions:
        completions = prompts.rollouts()
        rows = range(len(prompts.rows))
        graded = prompts.grade(rows, completions.ids)
        hinted = second_tries(graded, prompts.teacher_prompt)
        retries = dict(zip(hinted, prompts.sample(list(hinted.values())), strict=True))
        right = prompts.grade(list(retries), list(retries.values()))
        for (row, ids), is_right in zip(retries.items(), right, strict=True):
            if is_right and ids:
                completions.replace(row, ids)
        completions.rates = {
            "completions/retry_rate": (len(retries), len(rows)),
            "completions/retry_success_rate": (len(completions.replaced), len(retries)),
        }
        return completions


def second_tries(
    graded: Sequence[bool | None], teacher_prompt: Callable[[int], TokenIds | None]
) -> dict[int, TokenIds]:
    """
    Which rows get another try with the privileged context: those that are wrong, not those without a verdict.

    Args:
        graded (`Sequence[bool | None]`):
            Whether the first try of each row is right, `None` without a verdict.
        teacher_prompt (`Callable[[int], list[int] | None]`):
            Token ids of the prompt with the context of a row, `None` if it has none.

    Returns:
        `dict[int, list[int]]`:
            Token ids of the prompt of the second try, by row.
    """
    return teacher_prompts(teacher_prompt, (row for row, is_right in enumerate(graded) if is_right is False))


SOURCES: dict[str, type | str] = {
    "on_policy": OnPolicy,
    "dataset": FromDataset,
    "teacher": FromTeacher,
    "hinted_retry": HintedRetry,
}
