"""Cells of the tables of the page, from whatever results there are."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np

from ..eval.statistics import Estimate, paired_difference, proportion
from ..experiment.figures import Result, interval, with_interval
from ..experiment.runner import Results
from .arms import ARMS, PARTS, RealPlan


# Results of an arm by seed
Runs = Mapping[int, Result]

# Of what reading gives
GOAL = 2 / 3

# Final figures in tables: what they are called, factor, form
_FIGURES: dict[str, tuple[str, int, str]] = {
    "trained": ("trained wordings, %", 100, "{:.1f}"),
    "new": ("new wordings, %", 100, "{:.1f}"),
    "two": ("two facts, %", 100, "{:.1f}"),
    "test": ("right, %", 100, "{:.1f}"),
    "mean_tokens": ("tokens per answer", 1, "{:.1f}"),
    "unrelated": ("unrelated questions, %", 100, "{:.1f}"),
    "solved": ("sums and products, %", 100, "{:.1f}"),
    "divergence": ("divergence from the base", 1, "{:.3f}"),
}
_KEPT = ("unrelated", "solved", "divergence")
# The skill is sums, so that sums say nothing of what is kept
_SHOWN = {
    "facts": ("trained", "new", "two", *_KEPT, "mean_tokens"),
    "brevity": ("test", "mean_tokens", *_KEPT),
    "skill": ("test", "mean_tokens", "unrelated", "divergence"),
}
_COSTS: dict[str, tuple[str, str]] = {
    "generated_tokens": ("generated tokens", "{:,.0f}"),
    "seconds": ("seconds", "{:,.0f}"),
    "peak_memory_gb": ("GB at most", "{:.1f}"),
}

# Of each part: the arms between which it counts, the figure that is to change, and SFT
_FLOOR = {"facts": "floor", "brevity": "brevity_floor", "skill": "skill_floor"}
_TOLD = {"facts": "told", "brevity": "brevity_told", "skill": "skill_told"}
_AIM = {"facts": "new", "brevity": "mean_tokens", "skill": "test"}
_SFT = {"facts": "sft", "brevity": "brevity_sft", "skill": "skill_sft"}

AGAINST = (
    "arm",
    "of the way to the prompt",
    "seeds with two thirds of it",
    "right, points",
    "tokens per answer",
    "divergence from the base, nats",
    "unrelated questions, points",
)
WORDING_COLUMNS = ("it reads", "right, %", "tokens per answer", "an answer")
FAMILY_COLUMNS = ("family", "by itself, %", "reading the answer, %", "gap, points", "a problem")


def columns(base: str) -> list[str]:
    """Columns of the table of a part."""
    shown = [_FIGURES[name][0] for name in _SHOWN[base]]
    return ["arm", "seeds", "rate", *shown, *(title for title, _ in _COSTS.values())]


def row(plan: RealPlan, results: Results, base: str, arm: str, runs: Runs) -> list[str]:
    """
    The row of an arm.

    Args:
        plan ([`RealPlan`]):
            What there is to be.
        results ([`~trl_opsd.experiment.runner.Results`]):
            What there is.
        base, arm (`str`):
            Part and arm.
        runs (`Mapping[int, dict]`):
            Results by seed.

    Returns:
        `list[str]`: cells under [`columns`].
    """
    finals = [result["final"] for result in runs.values()]
    rates = plan.rates(base)
    rate = results.learning_rate(plan, arm, base) if results.is_tuned(plan, arm, base) else None
    at_end = len(rates) > 1 and rate in (min(rates), max(rates))
    figures = [_FIGURES[name][1:] for name in _SHOWN[base]]
    return [
        ARMS[arm].title,
        f"{len(runs)} of {len(plan.seeds)}",
        "–" if rate is None else f"{rate:g}{'*' if at_end else ''}",
        *(
            with_interval([its[name] for its in finals], scale=scale, form=form)
            for name, (scale, form) in zip(_SHOWN[base], figures, strict=True)
        ),
        *(with_interval([its[name] for its in runs.values()], form=form) for name, (_, form) in _COSTS.items()),
    ]


def reading(runs: Mapping[str, Runs], base: str) -> str:
    """What the model does by itself and while it reads, nothing if either is not known."""
    floor, told = runs.get(_FLOOR[base], {}), runs.get(_TOLD[base], {})
    if not floor or not told:
        return ""
    low, high = (fmean(result["final"][_AIM[base]] for result in its.values()) for its in (floor, told))
    if base == "brevity":
        return f"The model itself takes {low:.1f} tokens for an answer, and {high:.1f} told to be brief."
    what = {"facts": "the questions in new wordings", "skill": "the problems"}[base]
    source = {"facts": "facts", "skill": "answer"}[base]
    return (
        f"The model itself answers {100 * low:.1f} % of {what}, and {100 * high:.1f} % while it reads the {source}: "
        "the ceiling."
    )


def against_sft(runs: Mapping[str, Runs], base: str) -> list[list[str]]:
    """
    How far each arm comes from the model itself to the model that reads, and how it differs from SFT.

    Args:
        runs (`Mapping[str, Mapping[int, dict]]`):
            Results by arm and seed.
        base (`str`):
            The part.

    Returns:
        `list[list[str]]`: cells under [`AGAINST`], of the arms that have results.
    """
    floor, told, sft = (runs.get(its[base], {}) for its in (_FLOOR, _TOLD, _SFT))
    rows, right = [], PARTS[base].tests[0]
    for arm, its in runs.items():
        known = sorted(its.keys() & told.keys() & floor.keys())
        if ARMS[arm].trainer == "none" or not known:
            continue
        way = [_way(*(its[seed]["final"][_AIM[base]] for its in (runs[arm], floor, told))) for seed in known]
        differences = [
            "–" if arm == _SFT[base] else _difference(its, sft, name)
            for name in (right, "mean_tokens", "divergence", "unrelated")
        ]
        reached = f"{sum(share >= GOAL for share in way)} of {len(way)}"
        rows.append([ARMS[arm].title, f"{100 * fmean(way):.0f} %", reached, *differences])
    return rows


def _way(value: float, floor: float, told: float) -> float:
    return (value - floor) / (told - floor) if told != floor else 0.0


def _difference(ones: Runs, others: Runs, name: str) -> str:
    _, scale, form = _FIGURES[name]
    values = [
        scale * (ones[seed]["final"][name] - others[seed]["final"][name]) for seed in ones.keys() & others.keys()
    ]
    if len(values) < 2:
        return "–"
    mean, low, _ = interval(values)
    outcome = "" if abs(mean) <= mean - low else ", above" if mean > 0 else ", below"
    return f"{form.replace(':', ':+').format(mean)} ± {form.format(mean - low)}{outcome}"


def said(runs: Mapping[str, Runs], number: int = 6) -> tuple[int | None, list[str], list[list[str]]]:
    """The first answers of all arms with the first seed that two of them have: seed, columns and rows."""
    for seed in sorted({seed for its in runs.values() for seed in its}):
        its = {arm: done[seed]["answers"] for arm, done in runs.items() if seed in done}
        if len(its) > 1:
            first = next(iter(its.values()))
            titles = ["question", "right answer", *(ARMS[arm].title for arm in its)]
            rows = [
                [
                    _text(first[index]["question"]),
                    _text(first[index]["answer"]),
                    *(
                        f"{'✓' if answers[index]['right'] else '✗'} {_text(answers[index]['said'])}"
                        + (" …" if answers[index]["cut"] else "")
                        for answers in its.values()
                    ),
                ]
                for index in range(min(number, len(first)))
            ]
            return seed, titles, rows
    return None, [], []


def _text(said: str) -> str:
    """What was said, as text in a table."""
    text = " ".join(said.split())
    for character in "\\`*_[]<>|$":
        text = text.replace(character, f"\\{character}")
    return text


def wording_rows(once: Mapping[str, Any]) -> list[list[str]]:
    """What was found of ways to ask for brevity, cells under [`WORDING_COLUMNS`]."""
    return [
        [
            "the question alone" if its["wording"] is None else f"`{' '.join(its['wording'].split())}`",
            _share(its["right"]),
            with_interval(its["lengths"]),
            _text(its["said"]),
        ]
        for its in once.get("wordings", [])
    ]


def family_rows(once: Mapping[str, Any]) -> list[list[str]]:
    """What the probe found of the families, cells under [`FAMILY_COLUMNS`]."""
    rows = []
    for family, its in once.get("families", {}).items():
        gap = paired_difference(np.array(its["told"], dtype=float) - np.array(its["model"], dtype=float), step=1.0)
        rows.append(
            [
                f"`{family}`",
                _share(its["model"]),
                _share(its["told"]),
                _percent(gap, "{:+.0f}"),
                _text(its["question"]),
            ]
        )
    return rows


def _share(right: list[bool]) -> str:
    share = proportion(np.array(right, dtype=float), np.ones(len(right)), len(right))
    assert share is not None
    return _percent(share, "{:.0f}")


def _percent(estimate: Estimate, form: str) -> str:
    value = form.format(100 * estimate.value)
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"
