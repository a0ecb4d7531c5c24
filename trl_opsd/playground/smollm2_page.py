"""What people look at after the demo on SmolLM2: a table on the console, a plot and a page."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .present import write_page


if TYPE_CHECKING:
    from matplotlib.figure import Figure


METHODS = {
    "opsd": "OPSD: SmolLM2-135M learns from itself reading the worked solution.",
    "opsdc": "OPSDC: SmolLM2-135M learns from itself told to be concise.",
}
TEACHERS = {"opsd": "reading the solution", "opsdc": "told to be concise"}


def results_table(results: Mapping[str, Any]) -> Table:
    """Makes the summary table."""
    fixed, before, after = (results[name] for name in ("fixed_rollouts", "before", "after"))
    table = Table(
        title=f"{results['method'].upper()} on SmolLM2-135M, {results['problems']} held-out problems",
        caption=f"{results['steps']} steps, {results['num_generated_tokens']:,} generated tokens, "
        f"{results['seconds'] / 60:.1f} minutes, seed {results['seed']}.",
    )
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row(
        "divergence, same rollouts",
        f"{fixed['divergence'][0]:.3f}",
        f"{fixed['divergence'][-1]:.3f}",
        f"{fixed['change']:+.3f} ± {fixed['standard_error']:.3f}",
        style="bold",
    )
    table.add_row(
        "divergence, own rollouts",
        f"{before['divergence']:.3f}",
        f"{after['divergence']:.3f}",
        f"{after['divergence'] - before['divergence']:+.3f}",
    )
    for label, name in (("accuracy", "accuracy"), ("cut at the limit", "truncated")):
        table.add_row(
            label,
            f"{before[name]:.1%}",
            f"{after[name]:.1%}",
            f"{100 * (after[name] - before[name]):+.1f} points",
        )
    table.add_row(
        "response tokens",
        f"{before['tokens']:.1f}",
        f"{after['tokens']:.1f}",
        f"{after['tokens'] / before['tokens'] - 1:+.0%}",
    )
    return table


def plot(results: Mapping[str, Any]) -> "Figure":
    """Draws the course of the divergence, on held-out problems and in training."""
    from matplotlib.figure import Figure

    fixed, training = results["fixed_rollouts"], results["training"]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(training["steps"], training["divergence"], color="#9aa5b1", linewidth=1, label="training batches")
    axes.plot(fixed["steps"], fixed["divergence"], "o-", color="#2f6fde", label="held out, same rollouts")
    axes.plot(
        [0, results["steps"]],
        [results["before"]["divergence"], results["after"]["divergence"]],
        "s--",
        color="#d9822b",
        label="held out, own rollouts",
    )
    axes.set_title(f"{results['method'].upper()}: divergence from the teacher (nats per token)")
    axes.set_xlabel("optimizer step")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_results_page(results: Mapping[str, Any], folder: Path) -> None:
    """Writes the self-contained `index.html` of a run."""
    from ..report.page import table
    from ..report.run_report import paragraph

    method, fixed = results["method"], results["fixed_rollouts"]
    columns = [results["before"], results["after"]]
    change = f"{fixed['change']:+.3f} ± {fixed['standard_error']:.3f}"
    rows = [
        ["divergence, same rollouts", f"{fixed['divergence'][0]:.3f}", f"{fixed['divergence'][-1]:.3f} ({change})"],
        ["divergence, own rollouts", *(f"{column['divergence']:.3f}" for column in columns)],
        ["accuracy", *(f"{100 * column['accuracy']:.1f} %" for column in columns)],
        ["response tokens", *(f"{column['tokens']:.1f}" for column in columns)],
        ["cut at the limit", *(f"{100 * column['truncated']:.1f} %" for column in columns)],
    ]
    lead = (
        f"{METHODS[method]} The teacher is the same model {TEACHERS[method]}. The divergence, in nats per token, is "
        f"measured on {results['problems']} held-out problems, of kinds that were not trained on. Same rollouts: "
        "student and teacher read what the student wrote before the training, so that only the student's weights "
        f"differ between the two columns; it fell on {100 * fixed['lowered']:.0f} % of the rollouts. Own rollouts: "
        "they read what the student writes at that time, which is what the method minimises, with the noise of "
        "sampling."
    )
    cost = (
        f"{results['steps']} optimizer steps, {results['num_generated_tokens']:,} generated tokens, "
        f"{results['seconds'] / 60:.1f} minutes, seed {results['seed']}."
    )
    write_page(
        folder / "index.html",
        folder,
        f"{method.upper()} on SmolLM2-135M",
        [paragraph(lead), table(["", "before", "after"], rows), paragraph(cost)],
        plot(results),
        "The divergence over the training",
        results["examples"],
    )
