"""Docstrings in TRL's form as Markdown, and formulas as they are written in docstrings and pages."""

import re
from collections.abc import Callable, Iterator
from html import escape
from inspect import cleandoc
from textwrap import dedent, indent


SECTION = re.compile(r"(Args|Attributes|Example|Parameters|Raises|Returns|Yields):")
ENTRY = re.compile(r"`?(?P<names>\*{0,2}\w+(?:, \w+)*)`?(?: \((?P<type>.+)\))?:(?: (?P<text>.+))?")
LINK = re.compile(r"\[`~?([\w.]+)`\](?![(\[])")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"(```.*?```|`[^`\n]+`|\]\([^)]*\)|https?://\S+)", re.DOTALL)
CODE_OR_TAG = re.compile(rf"({CODE.pattern[1:-1]}|</?[a-z]\w*(?:\s[^>]*)?>)", re.DOTALL)

# A letter or two with what stands below or above it, as the formulas of docstrings and pages are written: p_T,v
_BELOW = re.compile(r"_(\{[^}]+\}|[A-Za-zα-ω0-9½]+(?:,[a-z]\b)?)")
# Not the one method whose name looks like it
_SHORT_BELOW = re.compile(rf"(?<![\w`#./-])(?!u_opsd\b)((?:JSD|[^\W\d_])[\u0300-\u036f′]?(?:&#42;)?){_BELOW.pattern}")
_FORMULA = re.compile(r"[^\W\d_]{1,2}(_\w+|\(\w′?\))? [=−] ")


def markdown(docstring: str, find: Callable[[str], str | None]) -> str:
    """
    Args:
        docstring (`str`):
            In TRL's form.
        find (`Callable[[str], str | None]`):
            From a name to the path that the site knows it by.
    """
    written: list[str] = []
    section, lines = None, []
    for line in [*cleandoc(docstring).split("\n"), None]:
        header = SECTION.fullmatch(line or "")
        if line is None or header or (section and line and not line.startswith(" ")):
            written += _section(section, "\n".join(lines))
            section, lines = (header[1] if header else None), []
        if line is not None and not header:
            lines.append(line)

    def link(match: re.Match[str]) -> str:
        path, last = find(match[1]), match[1].rpartition(".")[2]
        return f"[`{last}`][{path}]" if path else f"`{last}`"

    parts = FENCE.split("\n\n".join(written))
    return "".join(part if index % 2 else LINK.sub(link, part) for index, part in enumerate(parts))


def _section(section: str | None, text: str) -> Iterator[str]:
    if section is None:
        yield from (_paragraph(part) for part in _paragraphs(text))
        return
    yield f"**{ {'Args': 'Parameters'}.get(section, section) }**"
    text = dedent(text).strip("\n")
    if not text:  # code after `Example:`, which is not indented
        return
    if section in ("Returns", "Yields"):
        yield typeset(text)
        return
    entries: list[tuple[str, list[str]]] = []
    for line in text.split("\n"):
        entry = ENTRY.fullmatch(line)
        if line.startswith("> "):
            entries.append((f"**{line[2:]}**", []))
        elif entry and not line.startswith(" "):
            names = ", ".join(f"`{name}`" for name in entry["names"].split(", "))
            entries.append((f"{names} ({entry['type']})" if entry["type"] else names, [entry["text"] or ""]))
        else:
            entries[-1][1].append(line)
    for term, description in entries:
        first, *rest = description or [""]
        text = typeset("\n".join([first, dedent("\n".join(rest))]).strip())
        yield f"{term}\n:   {indent(text, '    ').lstrip()}" if text else term


def _paragraphs(text: str) -> list[str]:
    """Split at empty lines, but for those in fences."""
    parts = FENCE.split(text)
    return [
        piece
        for index, part in enumerate(parts)
        for piece in ([part] if index % 2 else re.split(r"\n{2,}", part.strip("\n")))
        if piece.strip()
    ]


def _paragraph(text: str) -> str:
    if not _FORMULA.match(text) or "`" in text:
        return typeset(text)
    formula = re.sub(
        r"\^(\{[^}]+\}|[\w½]+)", _raised("sup"), _BELOW.sub(_raised("sub"), _before(escape(text, quote=False)))
    )
    return '<div class="formula">' + formula.replace("\n", "<br>\n") + "</div>"


def typeset(text: str, *, has_html: bool = False) -> str:
    """Sets what stands below a letter outside of code, and protects what Markdown would take for its own."""
    parts = (CODE_OR_TAG if has_html else CODE).split(text)
    for index in range(0, len(parts), 2):
        part = parts[index] if has_html else re.sub(r"<(?=[^\W\d_])", "&lt;", parts[index])
        part = re.sub(r"(?<![\w*])([a-z])\*(?!\*)", r"\1&#42;", _before(part))
        parts[index] = _SHORT_BELOW.sub(lambda match: f"{match[1]}<sub>{match[2].strip('{}')}</sub>", part)
    return "".join(parts)


def _before(text: str) -> str:
    """The tokens before the one at t, which are written ŷ₍<t₎."""
    return re.sub("₍(?:<|&lt;)(\\w)₎", r"<sub>&lt;\1</sub>", text)


def _raised(tag: str) -> Callable[[re.Match[str]], str]:
    return lambda match: f"<{tag}>{match[1].strip('{}')}</{tag}>"
