"""What the demos have in common on the console and on their pages."""

import base64
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


if TYPE_CHECKING:
    from matplotlib.figure import Figure


_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2733; }
  table { border-collapse: collapse; margin: 1rem 0; }
  th, td { padding: .3rem .9rem; border-bottom: 1px solid #cdd5de; text-align: right; }
  th:first-child, td:first-child { text-align: left; }
  img { width: 100%; }
  pre { background: #f3f5f8; padding: .7rem; border-radius: 6px; white-space: pre-wrap; margin: 0; }
  .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-bottom: 1rem; }
</style>
<h1>{{ title }}</h1>
{{ body }}
<img alt="{{ caption }}" src="data:image/png;base64,{{ image }}">
<h2>Answers before and after</h2>
{% for example in examples %}
<h3>{{ example.problem }} <small>(right: {{ example.answer }})</small></h3>
<div class="pair">
  <div>before<pre>{{ example.before }}</pre></div>
  <div>after<pre>{{ example.after }}</pre></div>
</div>
{% endfor %}
</html>
"""


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
    folder: Path,
    title: str,
    body: str,
    values: dict[str, Any],
    figure: "Figure",
    caption: str,
    examples: list[dict[str, str]],
) -> None:
    """
    Writes `plot.png` and the self-contained `index.html`.

    Args:
        folder (`Path`):
            Where they go.
        title (`str`):
            Title of the page.
        body (`str`):
            Jinja template of what comes before the plot.
        values (`dict[str, Any]`):
            What the template reads.
        figure ([`~matplotlib.figure.Figure`]):
            The plot.
        caption (`str`):
            What the plot shows, for those who cannot see it.
        examples (`list[dict[str, str]]`):
            Answers to show, each with `problem`, `answer`, `before` and `after`.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    (folder / "plot.png").write_bytes(buffer.getvalue())
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(_PAGE.replace("{{ body }}", body)).render(
        title=title,
        caption=caption,
        image=base64.b64encode(buffer.getvalue()).decode(),
        examples=examples,
        **values,
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
