"""One self-contained HTML page: what all pages of the library are made of."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape


if TYPE_CHECKING:
    from matplotlib.figure import Figure


_SHELL = Markup("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; \
script-src {hashes}">
<title>{title}</title>
<style>
{style}</style>
<header><h1>{title}</h1><button id="scheme" type="button" aria-label="Light or dark"></button></header>
<main>
{body}
</main>
{data}
{scripts}
</html>
""")


def asset(name: str) -> str:
    """Text of a stylesheet or script in `report/assets/`."""
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def page(
    title: str,
    body: Iterable[Markup],
    *,
    style: str = "",
    script: str = "",
    data: Mapping[str, Any] | None = None,
) -> str:
    """
    Makes a page that needs nothing beside itself: it follows the light or dark scheme of the reader's system, has a
    switch for it, fetches nothing, and runs no script but its own, whatever text it shows.

    Args:
        title (`str`):
            Title and heading.
        body (`Iterable[Markup]`):
            What the page shows, in order, such as what [`table`] and [`figure`] return. Text goes into it by
            `Markup("<p>{}</p>").format(text)`, which escapes it.
        style (`str`, *optional*, defaults to `""`):
            More CSS. Colours are `var(--page)`, `--panel`, `--line`, `--text`, `--quiet`, `--accent`, `--good`,
            `--bad`.
        script (`str`, *optional*, defaults to `""`):
            JavaScript to run once the page is there. The event `scheme` of the document says that light has become
            dark, or dark light. Attributes such as `onclick` do not run: use `addEventListener`.
        data (`Mapping[str, Any]`, *optional*):
            Values that JSON holds, by the id under which the script finds them:
            `JSON.parse(document.getElementById(id).textContent)`.

    Returns:
        `str`:
            HTML that can be written as UTF-8. Of characters that cannot, lone surrogates, the number is shown.

    Raises:
        TypeError: If a part of the body is text that has not been escaped.
        ValueError: If `data` has a number that JSON does not, NaN or infinite: say `None`.
    """
    body = list(body)
    for part in body:
        if not isinstance(part, Markup):
            raise TypeError(f"The body of a page is made of Markup, and this is {type(part).__name__}: {part!r:.80}.")
    scripts = [f"\n{source}" for source in (asset("page.js"), script) if source]
    html = _SHELL.format(
        title=title,
        style=Markup(asset("page.css") + style),
        hashes=Markup(" ".join(map(_hash, scripts))),
        body=Markup("\n").join(body),
        data=Markup("\n").join(_embedded(name, value) for name, value in (data or {}).items()),
        scripts=Markup("\n".join(f"<script>{source}</script>" for source in scripts)),
    )
    return _encodable(html)


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str = "") -> Markup:
    """
    Makes a table whose first column names the rows.

    Args:
        header (`Sequence[Any]`):
            Names of the columns.
        rows (`Iterable[Sequence[Any]]`):
            Cells: Markup as it is, all else as text.
        caption (`str`, *optional*, defaults to `""`):
            What the table shows.

    Returns:
        `Markup`:
            The table, which scrolls on its own where the page is too narrow.

    Raises:
        ValueError: If a row has not a cell for each column.
    """
    lines = []
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"A row has {len(row)} cells, and the table {len(header)} columns: {list(row)}.")
        cells = Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row[1:])
        lines.append(Markup('<tr><th scope="row">{}</th>{}</tr>').format(row[0], cells))
    names = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in header)
    described = Markup("<caption>{}</caption>").format(caption) if caption else ""
    inner = Markup("<thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody>").format(names, Markup("\n").join(lines))
    return Markup('<div class="scroll"><table>{}{}</table></div>').format(described, inner)


def figure(drawn: "Figure", caption: str) -> Markup:
    """
    Puts a plot into the page as SVG: black is the page's colour of text and white its background, all other colours
    stay, so they have to be visible on both.

    Args:
        drawn ([`~matplotlib.figure.Figure`]):
            The plot. Draw it in the default style, on no background of its own.
        caption (`str`):
            What the plot shows, below it and for those who cannot see it.

    Returns:
        `Markup`:
            The figure.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "trl-opsd"}):
        drawn.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)  # the page scales it
    svg = re.sub(r' id="[a-z0-9]+_\d+"', "", svg)  # names that nothing refers to, the same in all plots
    svg = svg.replace(": #000000", ": currentColor").replace(": #ffffff", ": var(--page)")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return Markup("<figure>\n{}\n<figcaption>{}</figcaption>\n</figure>").format(Markup(svg), caption)


def _hash(source: str) -> str:
    digest = hashlib.sha256(_encodable(source).encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _embedded(name: str, value: Any) -> Markup:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # No tag can begin in it
    return Markup('<script type="application/json" id="{}">{}</script>').format(
        name, Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
    )


def _encodable(text: str) -> str:
    # In JSON, the number of a surrogate is how the character itself is written
    return text.encode("utf-8", "backslashreplace").decode()
