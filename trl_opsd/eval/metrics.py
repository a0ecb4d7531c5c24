"""What a run of one benchmark shows: accuracy in its several forms, lengths, truncation, repetition, markers."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb

import numpy as np
import numpy.typing as npt

from ..sampling.loops import is_repetitive
from .equivalence import normalise
from .markers import count_marker_substrings, count_marker_words
from .samples import Sample
from .statistics import Array, Estimate, bootstrap, proportion


@dataclass(frozen=True)
class Summary:
    """
    Metrics of one benchmark of one run, each with its 95 % interval over problems like these.

    Shares of completions are means over problems of each problem's share. `None`: there is nothing to tell it from.

    Args:
        benchmark (`str`):
            Name of the benchmark.
        num_problems (`int`):
            Number of problems.
        num_samples (`int`):
            Number of completions.
        samples_per_problem (`tuple[int, int]`):
            Fewest and most completions of a problem. They differ when the run is unfinished.
        num_ungraded (`int`):
            Completions without a verdict, since the reference answer cannot be parsed. They do not count towards any
            accuracy.
        num_uncompared (`int`):
            Completions whose answer could not be compared with the reference, and counts as wrong.
        avg_at_k (`Estimate`, *optional*):
            Share of right answers: expected accuracy of one completion.
        pass_at_k (`dict[int, Estimate]`):
            Per k, the probability that at least one of k completions is right. Powers of two, and all completions.
        majority_at_k (`Estimate`, *optional*):
            Share of problems whose most frequent answer is right.
        accuracy_terminated (`Estimate`, *optional*):
            Share of right answers among the completions that ended by themselves.
        accuracy_at_budget (`dict[int, Estimate]`):
            Per number of tokens, the share of completions that are right, ended, and no longer than that.
        mean_tokens (`Estimate`):
            Mean length, in tokens.
        token_quantiles (`dict[int, Estimate]`):
            10th, 50th and 90th percentile of the lengths of all completions, in tokens.
        truncation_rate (`Estimate`):
            Share of completions that were cut off at the token limit.
        repetition_rate (`Estimate`):
            Share of completions that end in a loop, see [`~trl_opsd.sampling.loops.is_repetitive`].
        marker_substrings (`Estimate`):
            Epistemic markers per completion, also inside other words, as published.
        marker_words (`Estimate`):
            Epistemic markers per completion that are words of their own.
        marker_words_per_1k_tokens (`Estimate`):
            The same per 1,000 tokens.
        answer_formats (`dict[str, float]`):
            Share of each format among all completions; `"none"` for those without an answer.
    """

    benchmark: str
    num_problems: int
    num_samples: int
    samples_per_problem: tuple[int, int]
    num_ungraded: int
    num_uncompared: int
    avg_at_k: Estimate | None
    pass_at_k: dict[int, Estimate]
    majority_at_k: Estimate | None
    accuracy_terminated: Estimate | None
    accuracy_at_budget: dict[int, Estimate]
    mean_tokens: Estimate
    token_quantiles: dict[int, Estimate]
    truncation_rate: Estimate
    repetition_rate: Estimate
    marker_substrings: Estimate
    marker_words: Estimate
    marker_words_per_1k_tokens: Estimate
    answer_formats: dict[str, float]


class SampleTable:
    """
    Samples of one benchmark of one run, in columns and in a fixed order.

    Args:
        samples (`Sequence[Sample]`):
            Samples of one benchmark, in any order.

    Raises:
        `ValueError`: If there are none, if they are of several benchmarks, if a sample is there twice, if a problem
            has two reference answers, or if a completion has no tokens.
    """

    def __init__(self, samples: Sequence[Sample]):
        if not samples:
            raise ValueError("There are no samples to summarise.")
        self.samples = sorted(samples, key=lambda sample: (sample.problem_id, sample.sample_index))
        self.benchmark = self.samples[0].benchmark
        self.references: dict[str, str] = {}
        for sample, previous in zip(self.samples, [None, *self.samples], strict=False):
            name = f"Sample {sample.sample_index} of problem {sample.problem_id!r}"
            if sample.benchmark != self.benchmark:
                raise ValueError(
                    f"Samples of two benchmarks, {self.benchmark!r} and {sample.benchmark!r}: summarise each apart."
                )
            if previous is not None and (previous.problem_id, previous.sample_index) == (
                sample.problem_id,
                sample.sample_index,
            ):
                raise ValueError(f"{name} is there twice: `sample_index` must differ.")
            if sample.num_tokens < 1:
                raise ValueError(f"{name} has `num_tokens={sample.num_tokens}`, but it counts the end-of-turn token.")
            reference = self.references.setdefault(sample.problem_id, sample.reference)
            if sample.reference != reference:
                raise ValueError(
                    f"Problem {sample.problem_id!r} has two reference answers, {reference!r} and "
                    f"{sample.reference!r}: `problem_id` must identify a problem."
                )
        self.problem_ids = list(self.references)
        position = {problem_id: index for index, problem_id in enumerate(self.problem_ids)}
        self.owner = np.array([position[sample.problem_id] for sample in self.samples])
        self.counts = np.bincount(self.owner)
        self.tokens = np.array([sample.num_tokens for sample in self.samples], dtype=np.float64)
        self.truncated = np.array([not sample.terminated for sample in self.samples])
        self.marker_words = np.array([count_marker_words(sample.completion) for sample in self.samples])
        self.marker_substrings = np.array([count_marker_substrings(sample.completion) for sample in self.samples])

    def means(self, values: npt.NDArray) -> Array:
        """Mean of some values of the samples, per problem."""
        return np.asarray(np.bincount(self.owner, weights=values) / self.counts)

    def share(self, values: npt.NDArray) -> Estimate:
        """Mean over problems of the share of samples for which something holds."""
        share = proportion(self.means(values), np.ones(len(self.problem_ids)), len(self.samples))
        assert share is not None
        return share


def summarize(samples: Sequence[Sample]) -> Summary:
    """
    Computes all metrics of one benchmark of one run.

    Args:
        samples (`Sequence[Sample]`):
            Samples of one benchmark, in any order.

    Returns:
        [`Summary`]:
            The metrics.

    Raises:
        `ValueError`: If the samples are not those of one benchmark, each once.
    """
    return summarize_table(SampleTable(samples), token_budgets(samples))


def summarize_table(table: SampleTable, budgets: Sequence[int]) -> Summary:
    """As [`summarize`], of samples that are already in a table."""
    graded = [sample for sample in table.samples if sample.correct is not None]
    accuracies = _accuracies(graded, budgets) if graded else (None, {}, None, None, {})
    avg_at_k, pass_at_k, majority_at_k, accuracy_terminated, accuracy_at_budget = accuracies

    tokens = table.means(table.tokens)
    columns = np.stack([tokens, table.means(table.marker_substrings), table.means(table.marker_words)], axis=1)

    def means(weights: Array) -> Array:
        sums = weights @ columns
        return np.column_stack([sums / weights.sum(axis=1, keepdims=True), 1000 * sums[:, 2] / sums[:, 0]])

    mean_tokens, substrings, words, words_per_1k = bootstrap(len(tokens), means)
    formats = Counter(sample.answer_format or "none" for sample in table.samples)
    return Summary(
        benchmark=table.benchmark,
        num_problems=len(table.problem_ids),
        num_samples=len(table.samples),
        samples_per_problem=(int(table.counts.min()), int(table.counts.max())),
        num_ungraded=len(table.samples) - len(graded),
        num_uncompared=sum(sample.error is not None for sample in table.samples),
        avg_at_k=avg_at_k,
        pass_at_k=pass_at_k,
        majority_at_k=majority_at_k,
        accuracy_terminated=accuracy_terminated,
        accuracy_at_budget=accuracy_at_budget,
        mean_tokens=mean_tokens,
        token_quantiles=_token_quantiles(table),
        truncation_rate=table.share(table.truncated),
        repetition_rate=table.share(np.array([is_repetitive(sample.completion) for sample in table.samples])),
        marker_substrings=substrings,
        marker_words=words,
        marker_words_per_1k_tokens=words_per_1k,
        answer_formats={name: formats[name] / len(table.samples) for name in sorted(formats)},
    )


def token_budgets(samples: Sequence[Sample]) -> list[int]:
    """
    Powers of two from below the shortest completion up to the longest, and the longest itself.

    Args:
        samples (`Sequence[Sample]`):
            At least one sample.

    Returns:
        `list[int]`:
            Numbers of tokens, ascending.
    """
    lengths = [sample.num_tokens for sample in samples]
    shortest, longest = min(lengths), max(lengths)
    powers = [2**exponent for exponent in range(longest.bit_length()) if 2 * 2**exponent > shortest]
    return sorted({*powers, longest})


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """
    The unbiased estimate of the probability that at least one of k completions of a problem is right,
    1 − C(n − c, k) / C(n, k), from [Evaluating Large Language Models Trained on Code](https://huggingface.co/papers/2107.03374).

    Args:
        num_samples (`int`):
            Completions n of the problem.
        num_correct (`int`):
            Right ones c among them.
        k (`int`):
            From 1 to n.

    Returns:
        `float`:
            Share of the subsets of k completions with a right one.

    Raises:
        `ValueError`: If k is not from 1 to n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"pass@{k} needs at least {k} completions per problem and k of at least 1, got {num_samples}."
        )
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def answer_key(answer: str) -> str:
    """
    The form of an answer by which votes are counted.

    Args:
        answer (`str`):
            Extracted answer.

    Returns:
        `str`:
            The answer without unit, currency, spaces, sizes of brackets, a name in front of its value and distinctions
            of case; numbers and fractions of numbers in lowest terms, so that `\\frac{1}{2}`, `1/2` and `0.5` are one
            vote. Other answers that are equal only by algebra stay apart.
    """
    text = normalise(answer.replace("$", " ")) if len(answer) <= 1000 else answer
    text = re.sub(r"\\[,;:! ]|\s", "", text).rstrip(".").lower()
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"^[a-z]=(?=[^=]+$)", "", text)
    text = re.sub(r"\\[dt]?frac(?:\{([^{}]*)\}\{([^{}]*)\}|(\d)(\d))", r"\\frac{\1\3}{\2\4}", text)
    text = re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", text)
    number = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", number):
        number = number.replace(",", "")
    try:
        # Not "1e999999999", which Fraction would write out.
        return str(Fraction(number)) if re.fullmatch(r"[+-]?[\d.]+(/\d+)?", number) else text
    except (ValueError, ZeroDivisionError):
        return text


def majority_share(samples: Sequence[Sample]) -> float:
    """
    Whether the most frequent answer of a problem is right ([self-consistency](https://huggingface.co/papers/2203.11171)).

    Args:
        samples (`Sequence[Sample]`):
            Graded samples of one problem. Those without an answer do not vote.

    Returns:
        `float`:
            1 or 0; on a tie, the share of right ones among the tied answers. 0 when nobody votes.
    """
    votes: dict[str, list[bool]] = {}
    for sample in samples:
        if sample.answer is not None:
            votes.setdefault(answer_key(sample.answer), []).append(bool(sample.correct))
    most = max(map(len, votes.values()), default=0)
    winners = [verdict for verdicts in votes.values() if len(verdicts) == most for verdict in verdicts]
    return sum(winners) / len(winners) if winners else 0.0


def _accuracies(
    graded: Sequence[Sample], budgets: Sequence[int]
) -> tuple[Estimate, dict[int, Estimate], Estimate | None, Estimate | None, dict[int, Estimate]]:
    problems: dict[str, list[Sample]] = {}
    for sample in graded:
        problems.setdefault(sample.problem_id, []).append(sample)

    def share(per_problem: Sequence[float]) -> Estimate:
        estimate = proportion(np.array(per_problem, dtype=np.float64), np.ones(len(problems)), len(graded))
        assert estimate is not None
        return estimate

    groups = list(problems.values())
    counts = [(len(group), sum(bool(sample.correct) for sample in group)) for group in groups]
    fewest = min(n for n, _ in counts)
    ks = sorted({2**exponent for exponent in range(fewest.bit_length())} | {fewest})
    ended = [[sample for sample in group if sample.terminated] for group in groups]
    num_ended = np.array([len(group) for group in ended], dtype=np.float64)
    return (
        share([c / n for n, c in counts]),
        {k: share([pass_at_k(n, c, k) for n, c in counts]) for k in ks},
        share([majority_share(group) for group in groups]),
        proportion(
            np.array([sum(bool(sample.correct) for sample in group) for group in ended], dtype=np.float64),
            num_ended,
            int(num_ended.sum()),
        ),
        {
            budget: share(
                [
                    sum(bool(sample.correct) for sample in finished if sample.num_tokens <= budget) / len(group)
                    for group, finished in zip(groups, ended, strict=True)
                ]
            )
            for budget in budgets
        },
    )


def _token_quantiles(table: SampleTable) -> dict[int, Estimate]:
    percents = (10, 50, 90)
    order = np.argsort(table.tokens, kind="stable")
    lengths, owner = table.tokens[order], table.owner[order]

    def quantiles(weights: Array) -> Array:
        cumulative = np.cumsum(weights[:, owner], axis=1)
        # The first length that at least this share of the samples does not exceed.
        return np.stack(
            [lengths[np.argmax(100 * cumulative >= percent * cumulative[:, -1:], axis=1)] for percent in percents],
            axis=1,
        )

    return dict(zip(percents, bootstrap(len(table.problem_ids), quantiles), strict=True))
