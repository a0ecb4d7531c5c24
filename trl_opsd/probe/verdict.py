"""What a measurement says, in words."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .readings import NONE, OTHER, SHUFFLED, TEACHER


MARGIN = 0.05
"""Difference in accuracy below which there is nothing to learn."""
SHORTER = 0.1
"""Share by which answers that are as often right have to be shorter to be worth learning."""
COPIED = 0.5
"""Share of answers that follow another problem's solution, or of text that stands in the solution, of a copy."""

EXCESS = 0.1
"""Share of the text by which it has to stand in the solution more than the student's does."""

CONCLUSIONS = {
    "worth_training": "Worth training.",
    "nothing_to_learn": "Nothing to learn.",
    "only_the_prompt": "Only the prompt teaches.",
    "copies": "The teacher copies.",
    "undecided": "Undecided: too few rows.",
}
_CONTROLS = {
    OTHER: "with another problem's solution",
    SHUFFLED: "with the solution's lines shuffled",
    NONE: "reading the question alone",
}


@dataclass(frozen=True)
class Verdict:
    """
    What a measurement says.

    Args:
        conclusion (`str`):
            Key of `CONCLUSIONS`.
        sentences (`list[str]`):
            The figures it follows from, then what it means.
    """

    conclusion: str
    sentences: list[str]


def judge(summary: Mapping[str, Any]) -> Verdict:
    """
    Say what a measurement means.

    Args:
        summary (`Mapping[str, Any]`):
            What [`~trl_opsd.probe.summary.summarize`] gives.
    """
    gap = summary["differences"][TEACHER]
    if gap is None:
        return Verdict(
            "undecided",
            ["No row has a context, so that the teacher reads none. Where it reads rollouts, none was of use to it."],
        )
    sentences = [_gap(summary, gap), *_text(summary)]
    conclusion, why = _conclusion(summary, gap)
    return Verdict(conclusion, [*sentences, *why])


def _gap(summary: Mapping[str, Any], gap: Mapping[str, Any]) -> str:
    student, teacher = (summary["arms"][arm]["accuracy"]["value"] for arm in ("student", TEACHER))
    value = gap["accuracy"]["value"]
    said = f"The teacher is {points(gap['accuracy'], sign=-1 if value < 0 else 1)} points "
    said += f"{'worse' if value < 0 else 'better'} "
    said += f"({100 * teacher:.0f} % against {100 * student:.0f} %, {gap['num_rows']} rows)"
    remaining = [
        _remaining(its["accuracy"], words)
        for arm, words in _CONTROLS.items()
        if (its := summary["differences"].get(arm)) is not None
    ]
    return "; ".join([said, *remaining]) + "."


def _remaining(accuracy: Mapping[str, Any], words: str) -> str:
    if accuracy["high"] < 0:
        return f"it is {points(accuracy, sign=-1)} points worse than the student {words}"
    return f"{points(accuracy)} points remain {words}"


def _text(summary: Mapping[str, Any]) -> list[str]:
    arms, gap = summary["arms"], summary["differences"][TEACHER]
    tokens = [arms[arm]["tokens"]["value"] for arm in ("student", TEACHER)]
    percents = round(100 * gap["shorter"]["value"])
    compared = f"{abs(percents)} % {'shorter' if percents > 0 else 'longer'}" if percents else "as long"
    sentences = [f"Its answers have {tokens[1]:.0f} tokens where the student's have {tokens[0]:.0f}: {compared}."]
    copying = summary["copying"]
    if copying["verbatim"] is not None:
        sentences.append(
            f"{percent(copying['verbatim'][TEACHER])} of what it writes stands word for word in {copying['source']}, "
            f"of what the student writes {percent(copying['verbatim']['student'])}."
        )
    if copying["follows_other"] is not None:
        sentences.append(
            f"With another problem's solution, {percent(copying['follows_other'])} of its answers are that problem's."
        )
    divergence = summary["divergence"]
    if divergence is not None and divergence["divergence"]["value"] > 0:
        style, layout = (divergence["by_kind"][kind]["share"] or 0.0 for kind in ("style", "format"))
        said = (
            f"Of the divergence on the student's rollouts ({divergence['divergence']['value']:.3g} nats per token), "
        )
        said += f"{100 * style:.0f} % is at words of style and {100 * layout:.0f} % at punctuation and layout"
        if (rest := divergence["remaining"].get(OTHER)) is not None:
            said += f"; {_kept(rest)} when it reads another problem's solution"
        sentences.append(said + ".")
    return sentences


def _kept(rest: Mapping[str, Any]) -> str:
    if rest["value"] > 1:
        return f"it is {rest['value']:.1f} times as large"
    return f"{percent(rest)} of it remains"


def _conclusion(summary: Mapping[str, Any], gap: Mapping[str, Any]) -> tuple[str, list[str]]:
    accuracy = gap["accuracy"]
    if summary["reads_same"] and not summary.get("is_external"):
        return "nothing_to_learn", ["The teacher has the student's weights and reads what the student reads."]
    if accuracy["low"] > 0 and accuracy["high"] >= MARGIN:
        return _lead(summary)
    shorter = gap["shorter"]
    if accuracy["low"] > -MARGIN and _low(shorter) > SHORTER:
        return "worth_training", [
            f"It is as often right, to within {100 * MARGIN:.0f} points, with answers {percent(shorter)} shorter: "
            "what there is to learn is brevity."
        ]
    if accuracy["high"] < MARGIN:
        return "nothing_to_learn", [
            f"Its lead is below {100 * MARGIN:.0f} points, and the gain of training follows the teacher's lead."
        ]
    half = (accuracy["high"] - accuracy["low"]) / 2
    needed = max(gap["num_rows"] + 1, round(gap["num_rows"] * (half / MARGIN) ** 2))
    return "undecided", [
        f"The interval holds both no lead and one that matters. About {needed} rows give ± {100 * MARGIN:.0f} points."
    ]


def _lead(summary: Mapping[str, Any]) -> tuple[str, list[str]]:
    """What a teacher that is ahead is worth."""
    for arm in (OTHER, NONE):
        gain, lead = summary["differences"].get(arm), summary["teacher_minus"].get(arm)
        if gain is not None and lead is not None and gain["accuracy"]["low"] > 0 and lead["accuracy"]["low"] <= 0:
            return "only_the_prompt", [
                f"It is not measurably better than {_CONTROLS[arm]} ({points(lead['accuracy'])} points), so that its "
                "lead comes from the wording of the prompt, or from how it is asked, and not from the solution: ask "
                "the student so."
            ]
    copying = summary["copying"]
    follows, verbatim = copying["follows_other"], copying["verbatim"]
    repeats = verbatim is not None and verbatim[TEACHER]["value"] >= COPIED and _low(verbatim["difference"]) > EXCESS
    if repeats or (follows is not None and follows["low"] >= COPIED):
        how = "it repeats what it is shown" if repeats else "it gives the answer that it is shown, whatever was asked"
        return "copies", [
            f"Its lead is that {how}. What the student can learn from it is that text, along its own attempts: "
            "that helps where its steps are within its reach, and gives it no way to find others. Compare with SFT "
            "on it, or have the teacher read less (`answer`, `hint`, `partial_solution`)."
        ]
    if OTHER in summary["differences"]:
        return "worth_training", ["Its lead needs the right solution, and it does not come from repeating it."]
    return "worth_training", [
        "There is no other solution to exchange for what it reads, so that nobody can tell whether it needs the right "
        "one."
    ]


def _low(estimate: Mapping[str, Any]) -> float:
    """Lower end of an interval; the value of what is the same in all rows."""
    return float(estimate["value"] if estimate["low"] is None else estimate["low"])


def points(estimate: Mapping[str, Any], sign: int = 1) -> str:
    """A difference of accuracies in points, with its interval: `"31 [24, 38]"`."""
    bounds = sorted(100 * sign * estimate[name] for name in ("low", "high"))
    return f"{_whole(100 * sign * estimate['value'])} [{_whole(bounds[0])}, {_whole(bounds[1])}]"


def percent(estimate: Mapping[str, Any]) -> str:
    """A share in percent, with its interval if there is one."""
    said = f"{_whole(100 * estimate['value'])} %"
    if estimate["low"] is None:
        return said
    return f"{said} [{_whole(100 * estimate['low'])}, {_whole(100 * estimate['high'])}]"


def _whole(value: float) -> str:
    return f"{round(value) + 0:,d}"
