"""What a maker of data sets is given and gives."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..sampling import Sampling
from ..sampling.sources import TokenIds


@dataclass(frozen=True)
class Attempt:
    """
    A completion of a row's prompt, and what became of it.

    Args:
        row (`int`):
            Index of the row.
        completion (`str` or `list[dict[str, Any]]`):
            The completion as the row's prompt is: text, or messages.
        token_ids (`list[int]`):
            Its tokens, the one that ends it included.
        seed (`int`):
            Seed it was sampled with.
        truncated (`bool`):
            Whether it was cut off at the token limit.
        reward (`float`, *optional*):
            Sum of its rewards. `None` before it is graded, or where no reward function applies.
        correct (`bool`, *optional*):
            Whether the reward reaches `success_threshold`. `None` where there is no reward.
        sides (`list[bool]`, *optional*):
            Of a mixed completion: for each token, whether it was drawn after the first of its prompts.
    """

    row: int
    completion: Any
    token_ids: TokenIds
    seed: int
    truncated: bool
    reward: float | None = None
    correct: bool | None = None
    sides: list[bool] | None = None

    def shortcoming(self, needs_correct: bool) -> str | None:
        """
        Why it should not be learnt.

        Args:
            needs_correct (`bool`):
                Whether it has to be right.

        Returns:
            `str`, *optional*:
                `"empty"`, `"truncated"`, `"without a reward"` or `"wrong"`. `None` if nothing is wrong with it.
        """
        its = self.completion
        text = its if isinstance(its, str) else "".join(str(message.get("content") or "") for message in its)
        if not text.strip():
            return "empty"
        if self.truncated:
            return "truncated"
        if needs_correct and not self.correct:
            return "without a reward" if self.correct is None else "wrong"
        return None


@dataclass(frozen=True)
class Writer:
    """
    One of two models, or of two readings of one, that write a text together.

    Args:
        prompt_ids (`Sequence[list[int] | None]`):
            Token ids of the prompts that it reads, `None` for a row without one.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        sample (`Callable[[Sequence[int], Sequence[list[int]], str | None, int], list[Attempt]]`):
            As `sample` of [`Problems`], with the most tokens of a completion; without a text, there is no progress
            bar.
    """

    prompt_ids: Sequence[TokenIds | None]
    tokenizer: Any
    sample: Callable[[Sequence[int], Sequence[TokenIds], str | None, int], list[Attempt]]


@dataclass(frozen=True)
class Problems:
    """
    The rows of a data set, and what a maker can do with them.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            Rows, with their `prompt`.
        prompt_ids (`Sequence[list[int]]`):
            Token ids of the prompts.
        hinted_prompt_ids (`Sequence[list[int] | None]`):
            Token ids of the prompts with the privileged context, `None` for a row that has none. Without a context,
            all are `None`.
        sample (`Callable[[Sequence[int], Sequence[list[int]], str], list[Attempt]]`):
            Completions of any prompts, each for a row by its index; the text says what they are while they are made.
            Asked for the same prompt again, it gives another completion, and in a run that is taken up again the same
            ones in the same order, those that are there already without sampling.
        grade (`Callable[[Sequence[Attempt]], list[Attempt]]`):
            The same completions with their rewards. Without reward functions, they have none.
        mix (`Callable[[Sequence[int], Sequence[list[int]], Sequence[list[int]], float, str], list[Attempt]]`):
            As `sample`, of two prompts for each: a token is drawn after the first with the probability that is given,
            else after the second, and both go on with it.
        sampling ([`~trl_opsd.sampling.Sampling`]):
            How tokens are drawn.
        decode (`Callable[[int, list[int]], Any]`):
            From the index of a row and the token ids of a completion to the completion as the row's prompt is.
        writers (`Mapping[str, Writer]`):
            `"student"`, which reads the bare prompts, and for a maker that takes one `"teacher"`: a second model, or
            this one with the privileged context.
        has_second_model (`bool`):
            Whether the teacher is a second model.
    """

    rows: Sequence[Mapping[str, Any]]
    prompt_ids: Sequence[TokenIds]
    hinted_prompt_ids: Sequence[TokenIds | None]
    sample: Callable[[Sequence[int], Sequence[TokenIds], str], list[Attempt]]
    grade: Callable[[Sequence[Attempt]], list[Attempt]]
    mix: Callable[[Sequence[int], Sequence[TokenIds], Sequence[TokenIds], float, str], list[Attempt]]
    sampling: Sampling
    decode: Callable[[int, TokenIds], Any]
    writers: Mapping[str, Writer]
    has_second_model: bool


@dataclass
class Made:
    """
    What a maker made.

    Args:
        records (`list[dict[str, Any]]`, *optional*):
            Rows of the new data set.
        dropped (`Counter[str]`, *optional*):
            How many of what was tried gave no row, by the reason.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, row: Mapping[str, Any], attempt: Attempt, source: str, **others: Any) -> None:
        """
        Add a row for TRL's SFT trainer, with where it comes from.

        Args:
            row (`Mapping[str, Any]`):
                Row that was completed. Its bare prompt is what the completion is learnt as an answer to.
            attempt ([`Attempt`]):
                The completion.
            source (`str`):
                How it came about.
            **others (`Any`):
                Further columns.
        """
        record = {"prompt": row["prompt"], "completion": attempt.completion, "source": source}
        record |= {"row": attempt.row, "seed": attempt.seed, "truncated": attempt.truncated}
        record |= {"reward": attempt.reward, "correct": attempt.correct} | others
        self.records.append(record)


class Maker(Protocol):
    """
    Makes a data set of rows and their completions.

    Write a class in any importable module and name it in the command: `trl-opsd generate my_project.makers.Pairs`.
    """

    needs_rewards: bool
    """Whether it has to tell right from wrong."""
    needs_context: bool
    """Whether it reads the prompts with the privileged context."""
    takes_teacher: bool
    """Whether it has two writers, of which the second is another model or this one with the privileged context. A
    class without this attribute does not."""

    def __call__(self, problems: Problems) -> Made:
        """
        Make the data set.

        Args:
            problems ([`Problems`]):
                Rows, and what samples and grades.

        Returns:
            [`Made`]:
                Rows of the new data set in columns that a trainer of TRL reads: `prompt` and `completion` for SFT,
                `prompt`, `chosen` and `rejected` for DPO; any others say where they come from.
        """
        ...
