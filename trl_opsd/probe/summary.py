"""The figures of a measurement, each with its interval, paired by row."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from ..eval.statistics import Array, Estimate, bootstrap, paired_difference, proportion, sign_flip_p_value
from .measure import STUDENT, Record
from .readings import OTHER, TEACHER
from .tokens import KINDS, token_kinds, verbatim_share


Json = dict[str, Any]


def summarize(
    records: Sequence[Record], arms: Sequence[str], tokenizer: Any, solution_of: Callable[[int], str | None]
) -> Json:
    """
    Sum up what has been measured.

    Args:
        records (`Sequence[dict[str, Any]]`):
            What [`~trl_opsd.probe.measure.Measuring`] wrote. Rows of which an arm is missing are left out.
        arms (`Sequence[str]`):
            Names of the arms, the student's and the teacher's first.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of both.
        solution_of (`Callable[[int], str | None]`):
            From the index of a row to the solution that the teacher reads, `None` without one.

    Returns:
        `dict[str, Any]`: as docs/probe.md lists it, without verdict, settings and what is missing. Estimates are
        dictionaries with `value`, `low` and `high`.
    """
    by_key = {(record["row"], record["arm"]): record for record in records}
    rows = sorted(row for row, arm in by_key if arm == STUDENT and all((row, its) in by_key for its in arms))
    found = {arm: [by_key[row, arm] for row in rows] for arm in arms}
    differences = {arm: _difference(found[STUDENT], found[arm]) for arm in arms if arm != STUDENT}
    controls = [arm for arm in arms if arm not in (STUDENT, TEACHER)]
    solutions = [solution_of(row) for row in rows]
    source = "the solution" if any(solutions) else "the teacher's prompt"
    if not any(solutions):  # what the context shows is in the prompt, and nowhere else
        solutions = [record["read"] for record in found[TEACHER]]
    return {
        "num_rows": len(rows),
        "num_rows_with_context": sum(bool(record["completions"]) for record in found[TEACHER]),
        "reads_same": bool(rows) and all(record["reads_same"] for record in found[TEACHER]),
        "arms": {arm: _arm(found[arm]) for arm in arms},
        "differences": differences,
        "teacher_minus": {arm: _difference(found[arm], found[TEACHER]) for arm in controls},
        "copying": {"source": source, **_copying(found, solutions)},
        "divergence": _divergence(found, controls, tokenizer),
    }


def _arm(records: Sequence[Record]) -> Json:
    written = [record["completions"] for record in records if record["completions"]]
    number = sum(map(len, written))
    if not written:
        return {"num_rows": 0, "num_completions": 0, "accuracy": None, "tokens": None, "truncated": None}
    ones = np.ones(len(written))
    lengths = _means(written, lambda one: len(one["token_ids"]))
    return {
        "num_rows": len(written),
        "num_completions": number,
        "accuracy": _json(proportion(_means(written, lambda one: one["correct"]), ones, number)),
        "tokens": _json(_mean(lengths)),
        "truncated": _json(proportion(_means(written, lambda one: one["truncated"]), ones, number)),
    }


def _difference(base: Sequence[Record], new: Sequence[Record]) -> Json | None:
    """Of the rows that both have completed: new minus base."""
    pairs = [(a["completions"], b["completions"]) for a, b in zip(base, new, strict=True)]
    pairs = [pair for pair in pairs if all(pair)]
    if not pairs:
        return None
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    accuracy = _means(second, lambda one: one["correct"]) - _means(first, lambda one: one["correct"])
    lengths = [_means(side, lambda one: len(one["token_ids"])) for side in (first, second)]
    step = 1 / min(len(completions) for pair in pairs for completions in pair)
    return {
        "num_rows": len(pairs),
        "accuracy": _json(paired_difference(accuracy, step)),
        "p_value": sign_flip_p_value(accuracy),
        "shorter": _json(_ratio(lengths[0] - lengths[1], lengths[0])),
    }


def _copying(found: Mapping[str, Sequence[Record]], solutions: Sequence[str | None]) -> Json:
    shares = {}
    for arm, records in found.items():
        shares[arm] = [
            _or_none([verbatim_share(one["text"], solution) for one in record["completions"]]) if solution else None
            for record, solution in zip(records, solutions, strict=True)
        ]
    both = [
        (student, teacher)
        for student, teacher in zip(shares[STUDENT], shares[TEACHER], strict=True)
        if student is not None and teacher is not None
    ]
    verbatim: Json | None = None
    if both:
        verbatim = {arm: _json(_mean([its for its in given if its is not None])) for arm, given in shares.items()}
        verbatim["difference"] = _json(_mean([teacher - student for student, teacher in both]))
    followed = [
        [one["follows_other"] for one in record["completions"] if one["follows_other"] is not None]
        for record in found.get(OTHER, ())
    ]
    followed = [its for its in followed if its]
    follows = proportion(np.array([np.mean(its) for its in followed]), np.ones(len(followed)), sum(map(len, followed)))
    return {"verbatim": verbatim, "follows_other": _json(follows)}


def _divergence(found: Mapping[str, Sequence[Record]], controls: Sequence[str], tokenizer: Any) -> Json | None:
    tokens = [_tokens(found, controls, place, tokenizer) for place in range(len(found[STUDENT]))]
    tokens = [its for its in tokens if len(its["divergence"])]
    if not tokens:
        return None
    longest = max(int(its["position"].max()) for its in tokens) + 1
    bins = [(0, 1), *((2**power, 2 ** (power + 1)) for power in range(longest.bit_length()) if 2**power < longest)]

    def where(selects: Callable[[Mapping[str, Any]], Any]) -> Json:
        return _of_tokens(tokens, controls, selects)

    remaining = {}
    for arm in controls:
        own, other = (
            np.array([its[name][~np.isnan(its[arm])].sum() for its in tokens]) for name in ("divergence", arm)
        )
        remaining[arm] = _json(_ratio(other, own)) if own.sum() > 0 else None
    return {
        **where(lambda its: np.ones(len(its["divergence"]), dtype=bool)),
        "by_kind": {kind: where(partial(_is_of, kind)) for kind in KINDS},
        "by_position": [{"from": low, "to": high, **where(partial(_is_between, low, high))} for low, high in bins],
        "remaining": remaining,
    }


def _is_of(kind: str, tokens: Mapping[str, Any]) -> Any:
    return tokens["kind"] == kind


def _is_between(low: int, high: int, tokens: Mapping[str, Any]) -> Any:
    return (tokens["position"] >= low) & (tokens["position"] < high)


def _tokens(
    found: Mapping[str, Sequence[Record]], controls: Sequence[str], place: int, tokenizer: Any
) -> dict[str, Any]:
    """The tokens of a row's rollouts that the teacher has read, in columns."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("position", "kind", "divergence", "delta", "student_entropy", "teacher_entropy")
    } | {arm: [] for arm in controls}
    for its, scores in enumerate(found[TEACHER][place]["scores"]):
        if scores is None:
            continue
        known = [position for position, is_known in enumerate(scores["known"]) if is_known]
        kinds = token_kinds(tokenizer, found[STUDENT][place]["completions"][its]["token_ids"])
        columns["position"] += known
        columns["kind"] += [kinds[position] for position in known]
        columns["delta"] += [scores["teacher_log_prob"][at] - scores["student_log_prob"][at] for at in known]
        for name in ("divergence", "student_entropy", "teacher_entropy"):
            columns[name] += [scores[name][at] for at in known]
        for arm in controls:
            theirs = found[arm][place]["scores"][its]
            columns[arm] += [
                np.nan if theirs is None or not theirs["known"][at] else theirs["divergence"][at] for at in known
            ]
    return {name: np.array(values) for name, values in columns.items()}


def _of_tokens(
    tokens: Sequence[Mapping[str, Any]], controls: Sequence[str], selects: Callable[[Mapping[str, Any]], Any]
) -> Json:
    chosen = [{name: values[selects(its)] for name, values in its.items()} for its in tokens]
    counts = np.array([len(its["divergence"]) for its in chosen], dtype=float)
    sums = np.array([its["divergence"].sum() for its in chosen])
    total = sum(its["divergence"].sum() for its in tokens)
    if not counts.sum():
        return {"num_tokens": 0, "divergence": None, "share": None, "entropy_gap": None, "delta": None, "controls": {}}
    gaps = np.array([(its["teacher_entropy"] - its["student_entropy"]).sum() for its in chosen])
    others = {}
    for arm in controls:
        known = np.array([(~np.isnan(its[arm])).sum() for its in chosen], dtype=float)
        values = np.array([np.nansum(its[arm]) for its in chosen])
        others[arm] = float(values.sum() / known.sum()) if known.sum() else None
    return {
        "num_tokens": int(counts.sum()),
        "divergence": _json(_ratio(sums, counts)),
        "share": float(sums.sum() / total) if total else None,
        "entropy_gap": _json(_ratio(gaps, counts)),
        "delta": float(sum(its["delta"].sum() for its in chosen) / counts.sum()),
        "controls": others,
    }


def _means(written: Iterable[Sequence[Any]], value: Callable[[Any], float]) -> Array:
    return np.array([np.mean([float(value(one)) for one in completions]) for completions in written])


def _or_none(values: Sequence[float | None]) -> float | None:
    known = [its for its in values if its is not None]
    return float(np.mean(known)) if known else None


def _mean(values: Sequence[float] | Array) -> Estimate | None:
    return _ratio(np.asarray(values, dtype=float), np.ones(len(values))) if len(values) else None


def _ratio(numerators: Array, denominators: Array) -> Estimate:
    """Σ numerators / Σ denominators over rows, with its bootstrap interval."""

    def statistic(weights: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.nan_to_num((weights @ numerators) / (weights @ denominators))[:, None]

    return bootstrap(len(numerators), statistic)[0]


def _json(estimate: Estimate | None) -> Json | None:
    return None if estimate is None else asdict(estimate)
