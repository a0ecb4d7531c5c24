"""The page of a probe: verdict, figures, plots, and some rows to read."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ..report.page import figure, page, table
from .measure import Record
from .readings import OTHER
from .verdict import CONCLUSIONS, percent, points


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN = "#0072b2", "#d55e00", "#009e73"
_NAMES = {
    "student": "student, reading the question alone",
    "teacher": "teacher, reading the recipe's context",
    "none": "control: the question alone, in the teacher's place",
    "other_solution": "control: another problem's solution",
    "shuffled_solution": "control: the solution's lines shuffled",
}
_SHOWN = 12
_CAPTION = (
    "Points ahead: of the student, on the rows that both have. Copied: the share of the text that stands word for "
    "word in the solution, or in the teacher's prompt where it shows none, in runs of eight words or more. In "
    "brackets: 95 % interval over rows like these."
)
_STYLE = """
.verdict { border-left: 4px solid var(--accent); background: var(--panel); padding: .6rem 1rem; margin: 1rem 0; }
.verdict strong { font-size: 1.15rem; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .6rem; }
details { margin: .6rem 0; }
"""


def arm_rows(result: Mapping[str, Any], names: Mapping[str, str]) -> list[list[str]]:
    """
    The table of the arms, but for its header.

    Args:
        result (`Mapping[str, Any]`):
            What `probe.json` says.
        names (`Mapping[str, str]`):
            What arms are called, if not as they are.
    """
    rows = []
    for arm, its in result["arms"].items():
        difference, verbatim = result["differences"].get(arm), result["copying"]["verbatim"]
        copied = None if verbatim is None else verbatim.get(arm)
        rows.append(
            [
                names.get(arm, arm),
                str(its["num_rows"]),
                "–" if its["accuracy"] is None else percent(its["accuracy"]),
                "–" if difference is None else points(difference["accuracy"]),
                "–" if its["tokens"] is None else f"{its['tokens']['value']:.1f}",
                "–" if its["truncated"] is None else _percent(its["truncated"]["value"]),
                "–" if copied is None else percent(copied),
            ]
        )
    return rows


ARM_HEADER = ["", "rows", "right", "points ahead", "tokens", "cut off", "copied"]


def make_page(result: Mapping[str, Any], records: Sequence[Record], questions: Sequence[Any]) -> str:
    """
    Make the page.

    Args:
        result (`Mapping[str, Any]`):
            What `probe.json` says.
        records (`Sequence[dict[str, Any]]`):
            What was measured.
        questions (`Sequence[Question]`):
            The rows.
    """
    verdict = result["verdict"]
    said = Markup("").join(Markup("<p>{}</p>").format(its) for its in verdict["sentences"])
    body = [
        Markup("<p class='quiet'>{} on {}. {}</p>").format(
            result["settings"]["method"], result["settings"]["model"], result["rows"]
        ),
        Markup("<div class='verdict'><strong>{}</strong>{}</div>").format(CONCLUSIONS[verdict["conclusion"]], said),
        table(ARM_HEADER, arm_rows(result, _NAMES), _CAPTION),
    ]
    if result["missing"]:
        items = Markup("").join(Markup("<li>{}: {}.</li>").format(*its) for its in result["missing"].items())
        body.append(Markup("<h2>What is not there</h2><ul>{}</ul>").format(items))
    if result["divergence"] is not None:
        body += [Markup("<h2>Where the teacher differs</h2>"), _kinds_table(result["divergence"])]
        body.append(
            figure(
                plot(result["divergence"]),
                "Divergence, and the teacher's entropy less the student's, on the student's rollouts.",
            )
        )
    body += [Markup("<h2>Rows</h2>"), *_examples(records, questions)]
    settings = [[name, str(value)] for name, value in result["settings"].items()]
    body.append(Markup("<details><summary>Settings</summary>{}</details>").format(table(["", ""], settings)))
    return page("Before training: what the teacher knows", body, style=_STYLE)


def _kinds_table(divergence: Mapping[str, Any]) -> Markup:
    has_other = OTHER in divergence["controls"]
    rows = []
    for kind, its in [("all", divergence), *divergence["by_kind"].items()]:
        if not its["num_tokens"]:
            continue
        cells = [kind, f"{its['num_tokens']:,}", _nats(its["divergence"]), _percent(its["share"])]
        other = its["controls"].get(OTHER)
        cells += [_nats(its["entropy_gap"]), *(["–" if other is None else f"{other:.3g}"] if has_other else [])]
        rows.append(cells)
    header = ["tokens of the student's rollouts", "number", "divergence (nats)", "share of it", "entropy gap (nats)"]
    header += ["divergence, another's solution"] if has_other else []
    return table(header, rows, "Entropy gap: the teacher's entropy less the student's.")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _nats(estimate: Mapping[str, Any]) -> str:
    said = f"{estimate['value']:.3g}"
    return said if estimate["low"] is None else f"{said} [{estimate['low']:.3g}, {estimate['high']:.3g}]"


def plot(divergence: Mapping[str, Any]) -> "Figure":
    """
    Draw divergence and entropy gap by kind and by position.

    Args:
        divergence (`Mapping[str, Any]`):
            Of `probe.json`.
    """
    from matplotlib.figure import Figure

    kinds = {name: its for name, its in divergence["by_kind"].items() if its["num_tokens"]}
    bins = [its for its in divergence["by_position"] if its["num_tokens"]]
    drawn = Figure(figsize=(9, 6.4), layout="constrained")
    (by_kind, gap_by_kind), (by_position, gap_by_position) = drawn.subplots(2, 2)
    for axes, gap, parts, labels in (
        (by_kind, gap_by_kind, list(kinds.values()), list(kinds)),
        (by_position, gap_by_position, bins, [_bin(its) for its in bins]),
    ):
        places = range(len(parts))
        axes.bar(
            places, [its["divergence"]["value"] for its in parts], color=_BLUE, width=0.4, align="edge", label="own"
        )
        if OTHER in divergence["controls"]:
            values = [its["controls"].get(OTHER) or 0.0 for its in parts]
            axes.bar(places, values, color=_ORANGE, width=-0.4, align="edge", label="another's solution")
            axes.legend(frameon=False)
        axes.set_ylabel("divergence (nats)")
        gap.bar(places, [its["entropy_gap"]["value"] for its in parts], color=_GREEN, width=0.6)
        gap.axhline(0, color="black", linewidth=0.8)
        gap.set_ylabel("entropy gap (nats)")
        for one in (axes, gap):
            one.set_xticks(list(places), labels)
            one.spines[["top", "right"]].set_visible(False)
    for one in (by_position, gap_by_position):
        one.set_xlabel("position in the rollout")
    return drawn


def _bin(its: Mapping[str, Any]) -> str:
    return str(its["from"]) if its["to"] == its["from"] + 1 else f"{its['from']}–{its['to'] - 1}"


def _examples(records: Sequence[Record], questions: Sequence[Any]) -> list[Markup]:
    """Rows that student and teacher disagree about, then others."""
    by_row: dict[int, dict[str, Record]] = {}
    for record in records:
        by_row.setdefault(record["row"], {})[record["arm"]] = record

    def order(row: int) -> tuple[bool, int]:
        first = [its["completions"][0]["correct"] for its in by_row[row].values() if its["completions"]]
        return len(set(first[:2])) < 2, row

    shown: list[Markup] = []
    for row in sorted(by_row, key=order)[:_SHOWN]:
        parts = [Markup("<div><h3>right answer</h3><pre>{}</pre></div>").format(questions[row].reference)]
        for arm, record in by_row[row].items():
            for one in record["completions"][:1]:
                mark = "right" if one["correct"] else "wrong"
                parts.append(
                    Markup("<div><h3>{} <span class='{}'>{}</span></h3><pre>{}</pre></div>").format(
                        arm, "good" if one["correct"] else "bad", mark, one["text"]
                    )
                )
        prompt: Any = questions[row].row["prompt"]
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        shown.append(
            Markup("<details{}><summary>{}</summary><div class='sides'>{}</div></details>").format(
                Markup(" open") if not shown else "", str(asked)[:200], Markup("").join(parts)
            )
        )
    return shown
