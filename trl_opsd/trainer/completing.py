"""Completing the prompts of a batch by a source that may need more than the student's own rollouts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..context import PrivilegedContext, as_text
from ..sampling.sources import Completions, CompletionSource, Prompts
from .asking import Gather
from .batch import Generation


@dataclass(frozen=True)
class Engines:
    """
    What samples and grades, each called by all processes at once and with as many rows.

    Args:
        sample (`Callable`):
            From prompts to the student's completions: token ids and log-probabilities.
        sample_teacher (`Callable`):
            From prompts to the teacher's completions: token ids.
        teacher_prompt (`Callable`):
            From a row, and another context if it is one, to what the teacher reads, `None` without a context.
        share_in_top_k (`Callable`):
            From prompts, completions and k to the share of their tokens that are among the student's k likeliest.
        encode (`Callable`):
            From a completion, text or messages, to token ids.
        grade (`Callable`):
            From rows, token ids of their prompts and of their completions to whether these are right.
        process_index (`int`):
            Number of the process.
        num_generations (`int`):
            Rollouts of a prompt.
        gather (`Callable`):
            From a list of each process to the list of all.
    """

    sample: Callable[[list[list[int]]], tuple[list[list[int]], Any]]
    sample_teacher: Callable[[list[list[int]]], list[list[int]]]
    teacher_prompt: Callable[[Mapping[str, Any], PrivilegedContext | None], list[int] | None]
    share_in_top_k: Callable[[list[list[int]], list[list[int]], int], list[float]]
    encode: Callable[[Any], list[int]]
    grade: Callable[[list[Mapping[str, Any]], list[list[int]], list[list[int]]], list[bool | None]]
    process_index: int
    num_generations: int
    gather: Gather


class Completing:
    """
    Completes the prompts of this process once. Sources ask for as many completions as they like: processes that ask
    for fewer than others sample and grade the first row besides, which counts for nothing.

    Args:
        engines ([`Engines`]):
            What samples and grades.
        generation ([`Generation`]):
            Its rows are completed; which completions are no rollouts, and how many tokens are in none, is noted there.
        prompt_ids (`Sequence[list[int]]`):
            Token ids of their prompts.
        rollouts (`Callable`):
            From nothing to the student's rollouts of all rows: token ids and log-probabilities.
    """

    def __init__(
        self,
        engines: Engines,
        generation: Generation,
        prompt_ids: Sequence[list[int]],
        rollouts: Callable[[], tuple[list[list[int]], Any]],
    ):
        self._engines = engines
        self._generation = generation
        self._rows = generation.rows
        self._prompt_ids = prompt_ids
        self._rollouts = rollouts
        self.num_sampled = 0

    def __call__(self, source: CompletionSource, seed: int, step: int) -> Completions:
        """
        Complete the prompts.

        Args:
            source ([`~trl_opsd.sampling.sources.CompletionSource`]):
                Says how.
            seed (`int`):
                Seed of the run.
            step (`int`):
                Optimizer steps done.

        Raises:
            ValueError: If the source does not give a completion for each prompt.
        """
        completions = source(
            Prompts(
                rows=self._rows,
                step=step,
                seed=seed,
                process_index=self._engines.process_index,
                rollouts=lambda: self._counted(*self._rollouts(), len(self._rows)),
                some_rollouts=lambda rows: self._sample([self._prompt_ids[row] for row in rows]),
                sample=lambda prompts: self._sample(prompts).ids,
                sample_teacher=lambda prompts: self._sample(prompts, by_teacher=True).ids,
                teacher_prompt=lambda row: self._engines.teacher_prompt(self._rows[row], None),
                prompt_with=lambda row, context: self._engines.teacher_prompt(self._rows[row], context),
                share_in_top_k=self._share_in_top_k,
                encode=self._engines.encode,
                grade=self._grade,
                group=self._group,
            )
        )
        if len(completions.ids) != len(self._rows):
            raise ValueError(
                f"{type(source).__name__} gave {len(completions.ids)} completions to {len(self._rows)} prompts of "
                "`completions`. Give one for each."
            )
        off_policy = {"completions/off_policy_rate": (len(completions.replaced), len(self._rows))}
        completions.rates = off_policy | completions.rates
        self._generation.num_discarded_tokens = self.num_sampled - sum(map(len, completions.ids))
        self._generation.replaced = completions.replaced
        return completions

    def _counted(self, ids: list[list[int]], log_probs: Any, number: int) -> Completions:
        """What was sampled for some prompts, without what was sampled besides."""
        self.num_sampled += sum(map(len, ids[:number]))
        return Completions(list(ids[:number]), None if log_probs is None else list(log_probs[:number]))

    def _sample(self, prompts: Sequence[list[int]], by_teacher: bool = False) -> Completions:
        asked = self._even(prompts, self._prompt_ids[0])
        if not asked:
            return Completions([])
        if by_teacher:
            return self._counted(self._engines.sample_teacher(asked), None, len(prompts))
        return self._counted(*self._engines.sample(asked), len(prompts))

    def _grade(self, rows: Sequence[int], completion_ids: Sequence[list[int]]) -> list[bool | None]:
        pairs = self._even(list(zip(rows, completion_ids, strict=True)), (0, []))
        if not pairs:
            return []
        indices, ids = zip(*pairs, strict=True)
        asked = [self._rows[index] for index in indices], [self._prompt_ids[index] for index in indices]
        return self._engines.grade(*asked, list(ids))[: len(rows)]

    def _group(self, values: Sequence[Any]) -> list[list[Any]]:
        everything, size = self._engines.gather(list(values)), self._engines.num_generations
        first = self._engines.process_index * len(values)
        starts = (first + index - (first + index) % size for index in range(len(values)))
        return [everything[start : start + size] for start in starts]

    def _share_in_top_k(self, rows: Sequence[int], completion_ids: Sequence[list[int]], k: int) -> list[float]:
        pairs = self._even(list(zip(rows, completion_ids, strict=True)), (0, []))
        if not pairs:
            return []
        prompts, ids = [self._prompt_ids[row] for row, _ in pairs], [ids for _, ids in pairs]
        return self._engines.share_in_top_k(prompts, ids, k)[: len(rows)]

    def _even(self, items: Sequence[Any], stand_in: Any) -> list[Any]:
        most = max(self._engines.gather([len(items)]))
        return [*items, *[stand_in] * (most - len(items))]


def encoded(
    tokenizer: PreTrainedTokenizerBase, end_token_id: int, max_completion_length: int | None, completion: Any
) -> list[int]:
    """
    Token ids of a dataset's completion, with the token that ends it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        end_token_id (`int`):
            The token that ends it.
        max_completion_length (`int`, *optional*):
            Most tokens.
        completion (`str` or `list[dict[str, Any]]`):
            Text or messages.

    Raises:
        ValueError: If it is longer, or nothing.
    """
    if not isinstance(completion, str):
        completion = "".join(message["content"] for message in as_text(completion))
    ids = [*tokenizer(completion, add_special_tokens=False)["input_ids"], end_token_id]
    if len(ids) == 1:
        raise ValueError(f"The completion {completion!r} of the dataset has no tokens. Correct the row, or drop it.")
    if max_completion_length is not None and len(ids) > max_completion_length:
        raise ValueError(
            f"The completion {completion[:60]!r}... of the dataset has {len(ids)} tokens, more than "
            f"`max_completion_length={max_completion_length}`. It is never truncated: raise the limit, or drop the "
            "row."
        )
    return ids


def with_stand_ins(
    completion_ids: Sequence[Sequence[int]], log_probs: Any, end_token_id: int
) -> tuple[list[list[int]], Any, set[int]]:
    """
    Completions without tokens, replaced by an end token, since GRPOTrainer looks at the last token of each.

    Args:
        completion_ids (`Sequence[Sequence[int]]`):
            Token ids.
        log_probs (`list[list[float | None]]`, *optional*):
            What the sampler reports of them. Changed where there is nothing.
        end_token_id (`int`):
            The end token.

    Returns:
        `tuple[list[list[int]], list[list[float | None]] | None, set[int]]`: both, and which were empty.
    """
    ids, empty = [list(its) for its in completion_ids], set()
    for index, its in enumerate(ids):
        if not its:
            empty.add(index)
            its.append(end_token_id)
            if log_probs is not None:
                log_probs[index] = [None]
    return ids, log_probs, empty


def without_empty(rollout_func: Callable[..., dict[str, Any]], mark: Callable[..., Any]) -> Callable[..., Any]:
    """
    A rollout function whose empty completions are marked, and no part of which is the student's.

    Args:
        rollout_func (`Callable[..., dict[str, Any]]`):
            The function.
        mark (`Callable`):
            From token ids and log-probabilities to the same without empty completions, and which were empty.
    """

    def marked(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        output = dict(rollout_func(prompts, trainer))
        if "completion_ids" in output:
            ids, log_probs, empty = mark(output["completion_ids"], output.get("logprobs"))
            output["completion_ids"], output["logprobs"] = ids, log_probs
            for index in empty if "env_mask" in output else ():
                output["env_mask"][index] = [0]
        return output

    return marked
