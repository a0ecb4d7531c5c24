"""What people look at after the demo on SmolLM2: a table on the console, a plot and a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .present import write_page


if TYPE_CHECKING:
    from matplotlib.figure import Figure


METHODS = {
    "opsd": "OPSD: SmolLM2-135M learns from itself reading the fact sheet, as it was before the training.",
    "sdft": "SDFT: SmolLM2-135M learns from itself reading the fact sheet, as a moving average of its weights.",
}
ASKED = {
    "trained": "questions that are trained on",
    "new": "the same questions in other words",
    "two": "questions that take two facts",
}
COLUMNS = ("before", "told", "after")
# Of what it gets right while it reads the facts: what it is to know by heart
GOAL = 2 / 3


def right(answers: Sequence[Mapping[str, Any]]) -> str:
    """How many answers are right."""
    number = sum(answer["right"] for answer in answers)
    return f"{100 * number / len(answers):.0f} % ({number} of {len(answers)})"


def share_kept(results: Mapping[str, Any]) -> float | None:
    """Recall in other words after the training, over that while reading; `None` where reading gets nothing right."""
    told, after = (sum(answer["right"] for answer in results[name]["new"]) for name in ("told", "after"))
    return after / told if told else None


def outcome(results: Mapping[str, Any]) -> str:
    """What came of it, in a sentence."""
    share = share_kept(results)
    if share is None:
        return "While it reads the facts it answers nothing, so that there was nothing to learn from."
    reached = "That is at least" if share >= GOAL else "That is less than"
    return (
        f"Asked in words that it was not trained on, it gets {100 * share:.0f} % of what it gets while it reads the "
        f"facts. {reached} the two thirds that this demo is for."
    )


def results_table(results: Mapping[str, Any]) -> Table:
    """Makes the summary table."""
    table = Table(
        title=f"{results['method'].upper()} on SmolLM2-135M, {results['facts']} made-up facts",
        caption=f"{results['steps']} steps, {results['num_generated_tokens']:,} generated tokens, "
        f"{results['seconds'] / 60:.1f} minutes, at most {results['peak_memory_gb']:.1f} GB, seed {results['seed']}.",
    )
    for name in ("right answers", "before", "while it reads the facts", "after"):
        table.add_column(name, justify="left" if name == "right answers" else "right")
    for name, asked in ASKED.items():
        table.add_row(asked, *(right(results[column][name]) for column in COLUMNS))
    return table


def plot(results: Mapping[str, Any]) -> "Figure":
    """Draws recall and divergence over the training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    shares, divergence = figure.subplots(1, 2)
    steps = [point["step"] for point in results["curve"]]
    for name, color in (("trained", "#9aa5b1"), ("new", "#2f6fde"), ("two", "#d9822b")):
        shares.plot(steps, [100 * point[name] for point in results["curve"]], "o-", color=color, label=ASKED[name])
    told = results["told"]["new"]
    ceiling = 100 * sum(answer["right"] for answer in told) / len(told)
    shares.axhline(ceiling, color="#2f6fde", linestyle=":", label="other words, while it reads the facts")
    shares.set_title("Right answers (%), of some of the questions")
    shares.set_ylim(-3, 103)
    shares.legend(frameon=False, fontsize=8)
    divergence.plot(results["training"]["steps"], results["training"]["divergence"], color="#2f6fde")
    divergence.set_title("Divergence from the teacher in training (nats per token)")
    divergence.set_ylim(bottom=0)
    for axes in (shares, divergence):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_results_page(results: Mapping[str, Any], folder: Path) -> None:
    """Writes the self-contained `index.html` of a run."""
    from markupsafe import Markup

    from ..report.page import table
    from ..report.run_report import folded, paragraph

    method = results["method"]
    rows = [[asked, *(right(results[column][name]) for column in COLUMNS)] for name, asked in ASKED.items()]
    cost = (
        f"{results['steps']} optimizer steps, {results['num_generated_tokens']:,} generated tokens, "
        f"{results['seconds'] / 60:.1f} minutes, at most {results['peak_memory_gb']:.1f} GB of memory, seed "
        f"{results['seed']}."
    )
    link = Markup(
        '<p><a href="tokens.html">Token by token</a>: what the teacher wanted of one answer, before and after.</p>'
    )
    said = [
        folded(
            f"All answers to {asked}",
            [table(["", "right answer", *COLUMNS], _said(results, name))],
        )
        for name, asked in ASKED.items()
    ]
    write_page(
        folder / "index.html",
        folder,
        f"{method.upper()} on SmolLM2-135M",
        [
            paragraph(
                f"{METHODS[method]} The {results['facts']} facts are made up, about people, towns and devices that do "
                "not exist: before, it can only guess. An answer is right if it names what is asked for and nothing "
                "else that could be."
            ),
            table(["right answers", "before", "while it reads the facts", "after"], rows),
            paragraph(outcome(results)),
            paragraph(cost),
            link,
            *said,
        ],
        plot(results),
        "Right answers and divergence over the training",
        _examples(results),
    )


def _said(results: Mapping[str, Any], name: str) -> list[list[str]]:
    columns = [results[column][name] for column in COLUMNS]
    return [
        [
            its[0]["question"],
            its[0]["answer"],
            *(f"{'right' if one['right'] else 'wrong'}: {one['said']}{' …' if one['cut'] else ''}" for one in its),
        ]
        for its in zip(*columns, strict=True)
    ]


def _examples(results: Mapping[str, Any], number: int = 4) -> list[dict[str, str]]:
    """The first answers, whatever they look like: a choice would flatter."""
    pairs = zip(results["before"]["new"], results["after"]["new"], strict=True)
    return [
        {"problem": one["question"], "answer": one["answer"], "before": one["said"], "after": other["said"]}
        for one, other in list(pairs)[:number]
    ]
