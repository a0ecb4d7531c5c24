"""What the demos have in common on the console and on their pages."""

import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..files import write_whole


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def refuse_flags(flags: Sequence[str], fields: Collection[str], reason: str) -> None:
    """
    Refuses the flags of a recipe's fields that a demo does not read.

    Args:
        flags (`Sequence[str]`):
            Flags that take precedence over the recipe, with their values.
        fields (`Collection[str]`):
            Fields that must not be among them.
        reason (`str`):
            Why not.

    Raises:
        ValueError: Naming the first such flag.
    """
    for flag in flags:
        name = flag.partition("=")[0]
        if name.startswith("--") and name[2:].replace("-", "_") in fields:
            raise ValueError(
                f"{reason}: `{name}` would change nothing. Leave it out, or train with `trl-opsd` and a recipe of "
                "your own."
            )


def quiet() -> None:
    """Keeps the libraries' remarks on loading, saving and defaults off the console."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)


@contextmanager
def stage(name: str, steps: int, console: Console) -> Iterator[tuple[Progress, TaskID]]:
    """A progress bar that leaves one line with the time taken."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )
    with progress:
        yield progress, progress.add_task(name, total=steps, status="")


def write_page(
    target: Path, run: Path, title: str, lead: Sequence[Markup], drawn: "Figure", caption: str, examples: Sequence[Any]
) -> None:
    """
    Writes the report of a demo: what it measured itself, then what `trl-opsd report` shows of its run.

    Args:
        target (`Path`):
            File to write.
        run (`Path`):
            Output folder of the training.
        title (`str`):
            Title of the page.
        lead (`Sequence[Markup]`):
            What comes before the plot.
        drawn ([`~matplotlib.figure.Figure`]):
            The plot.
        caption (`str`):
            What the plot shows.
        examples (`Sequence[Mapping[str, str]]`):
            Answers to show, each with `problem`, `answer`, `before` and `after`.
    """
    from ..report.answers import Answers
    from ..report.page import figure
    from ..report.run_report import report_page
    from ..report.runs import read_runs

    shown = [
        Answers(one["problem"], "", one["answer"], [(when, "", one[when]) for when in ("before", "after")])
        for one in examples
    ]
    lead = [*lead, figure(drawn, caption)]
    write_whole(target, report_page(read_runs([run]), target, title=title, lead=lead, examples=shown))
