"""What a run changed against another, problem by problem."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .metrics import SampleTable, Summary, summarize_table, token_budgets
from .samples import Sample
from .statistics import Array, Estimate, bootstrap, paired_difference, sign_flip_p_value


@dataclass(frozen=True)
class ProblemChange:
    """
    Share of right answers to one problem in both runs.

    Args:
        problem_id (`str`):
            The problem.
        base (`float`):
            Share in the base run.
        new (`float`):
            Share in the new run.
        change (`str`):
            `"improved"`, `"worse"` or `"same"`.
    """

    problem_id: str
    base: float
    new: float
    change: Literal["improved", "worse", "same"]


@dataclass(frozen=True)
class Comparison:
    """
    Two runs of one benchmark, paired by problem. Differences are new minus base, with 95 % intervals.

    Args:
        benchmark (`str`):
            Name of the benchmark.
        num_problems (`int`):
            Problems compared.
        num_left_out (`int`):
            Problems left out because only one run has them.
        base (`Summary`):
            Metrics of the base run on the problems compared.
        new (`Summary`):
            Metrics of the new run on them.
        accuracy_difference (`Estimate`, *optional*):
            Difference of avg@k. `None` when no problem is graded.
        p_value (`float`, *optional*):
            Two-sided p-value of that difference, by flipping signs of the problems' differences.
        length_reduction (`Estimate`):
            1 − mean tokens of the new run / of the base run. Negative when completions became longer.
        truncation_difference (`Estimate`):
            Difference of the truncation rate.
        marker_substrings_difference (`Estimate`):
            Difference of the epistemic markers per completion, as published.
        marker_words_per_1k_tokens_difference (`Estimate`):
            Difference of the epistemic markers per 1,000 tokens that are words of their own.
        changes (`list[ProblemChange]`):
            The graded problems.
        accuracy_verdict (`str`):
            What can be said about the accuracy, in words.
        length_verdict (`str`):
            What can be said about the length, in words.
    """

    benchmark: str
    num_problems: int
    num_left_out: int
    base: Summary
    new: Summary
    accuracy_difference: Estimate | None
    p_value: float | None
    length_reduction: Estimate
    truncation_difference: Estimate
    marker_substrings_difference: Estimate
    marker_words_per_1k_tokens_difference: Estimate
    changes: list[ProblemChange]
    accuracy_verdict: str
    length_verdict: str


def compare(base: Sequence[Sample], new: Sequence[Sample], common_only: bool = False) -> Comparison:
    """
    Compares two runs of one benchmark. The numbers of completions per problem may differ.

    Args:
        base (`Sequence[Sample]`):
            Samples of the run to compare with.
        new (`Sequence[Sample]`):
            Samples of the other.
        common_only (`bool`, *optional*, defaults to `False`):
            Whether to leave out problems that only one of them has.

    Returns:
        [`Comparison`]:
            The differences and the verdicts.

    Raises:
        `ValueError`: If the runs are of different benchmarks, differ in their problems, or disagree about a reference
            answer or about which problems can be graded.
    """
    if base and new and base[0].benchmark != new[0].benchmark:
        raise ValueError(
            f"The runs are of different benchmarks, {base[0].benchmark!r} and {new[0].benchmark!r}: compare each with "
            "its own."
        )
    base_ids, new_ids = ({sample.problem_id for sample in samples} for samples in (base, new))
    common = base_ids & new_ids
    if base and new and not common:
        raise ValueError("The two runs have no problem in common, so there is nothing to pair.")
    if not common_only and base_ids != new_ids:
        missing = [
            f"only the {run} run has {_named(ids - common)}"
            for run, ids in (("base", base_ids), ("new", new_ids))
            if ids - common
        ]
        raise ValueError(
            f"The runs differ in their problems: {'; '.join(missing)}. Leave them out with --common_only."
        )
    before = SampleTable([sample for sample in base if sample.problem_id in common])
    after = SampleTable([sample for sample in new if sample.problem_id in common])
    for problem_id, reference in before.references.items():
        if after.references[problem_id] != reference:
            raise ValueError(
                f"Problem {problem_id!r} has the reference answer {reference!r} in the base run and "
                f"{after.references[problem_id]!r} in the new run. Evaluate both on the same version of the data."
            )
    return _compare_tables(before, after, len(base_ids ^ new_ids))


def _compare_tables(before: SampleTable, after: SampleTable, num_left_out: int) -> Comparison:
    budgets = token_budgets(before.samples + after.samples)
    base, new = summarize_table(before, budgets), summarize_table(after, budgets)
    # What one completion of one problem changes, in the run that has fewer.
    step = 1 / min(base.samples_per_problem[1], new.samples_per_problem[1])

    accuracies = [_accuracies(table) for table in (before, after)]
    if differing := accuracies[0].keys() ^ accuracies[1].keys():
        raise ValueError(
            f"Only one run has verdicts for {_named(differing)}. Grade both runs with the same version of the scorer."
        )
    changes = [_change(problem_id, right, accuracies[1][problem_id]) for problem_id, right in accuracies[0].items()]
    differences = np.array([change.new - change.base for change in changes])
    accuracy = paired_difference(differences, step) if changes else None

    columns = np.stack(
        [
            table.means(values)
            for table in (before, after)
            for values in (table.tokens, table.marker_substrings, table.marker_words)
        ],
        axis=1,
    )

    def contrasts(weights: Array) -> Array:
        base_tokens, base_substrings, base_words, tokens, substrings, words = (weights @ columns).T
        return np.column_stack(
            [
                1 - tokens / base_tokens,
                (substrings - base_substrings) / weights.sum(axis=1),
                1000 * (words / tokens - base_words / base_tokens),
            ]
        )

    length, marker_substrings, marker_words = bootstrap(len(before.problem_ids), contrasts)
    return Comparison(
        benchmark=before.benchmark,
        num_problems=len(before.problem_ids),
        num_left_out=num_left_out,
        base=base,
        new=new,
        accuracy_difference=accuracy,
        p_value=sign_flip_p_value(differences) if changes else None,
        length_reduction=length,
        truncation_difference=paired_difference(after.means(after.truncated) - before.means(before.truncated), step),
        marker_substrings_difference=marker_substrings,
        marker_words_per_1k_tokens_difference=marker_words,
        changes=changes,
        accuracy_verdict=_verdict("Accuracy", accuracy, ("higher", "lower"), "points"),
        length_verdict=_verdict("Length", length, ("shorter", "longer"), "%"),
    )


def _accuracies(table: SampleTable) -> dict[str, float]:
    verdicts: dict[str, list[bool]] = {}
    for sample in table.samples:
        if sample.correct is not None:
            verdicts.setdefault(sample.problem_id, []).append(sample.correct)
    return {problem_id: sum(right) / len(right) for problem_id, right in verdicts.items()}


def _change(problem_id: str, base: float, new: float) -> ProblemChange:
    return ProblemChange(problem_id, base, new, "improved" if new > base else "worse" if new < base else "same")


def _verdict(subject: str, estimate: Estimate | None, words: tuple[str, str], unit: str) -> str:
    if estimate is None:
        return f"{subject}: no problem could be graded."
    value, low, high = estimate.value, estimate.low, estimate.high
    if low is None or high is None:
        if value == 0:
            return f"{subject}: no detectable difference, all problems are alike."
        word = words[0] if value > 0 else words[1]
        return (
            f"{subject}: {word} by {abs(100 * value):.1f} {unit} here, but one problem, or problems that are all "
            "alike, say nothing about others."
        )
    if low <= 0 <= high:
        return f"{subject}: no detectable difference, {100 * value:+.1f} {unit} [{100 * low:+.1f}, {100 * high:+.1f}]."
    word = words[0] if value > 0 else words[1]
    ends = sorted((abs(low), abs(high)))
    return f"{subject}: {word} by {abs(100 * value):.1f} {unit} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]."


def _named(problem_ids: Iterable[str]) -> str:
    names = sorted(problem_ids)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
