"""What griffe calls once it has read the package: docstrings become Markdown, and what they name becomes links."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import griffe
from docstrings import markdown


class TrlDocstrings(griffe.Extension):
    """Rewrites every docstring of the package, once all of it has been read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        documented = {child.path: child for child in walk(pkg)}
        for child in documented.values():
            find = partial(place, of=child, documented=documented)
            child.docstring.value = markdown(child.docstring.value, find)


def walk(parent: griffe.Object) -> Iterator[griffe.Object]:
    """An object and all below it that have a docstring."""
    if parent.docstring:
        yield parent
    for child in parent.members.values():
        if not child.is_alias:
            yield from walk(child)


def place(name: str, of: griffe.Object, documented: dict[str, griffe.Object]) -> str | None:
    """
    The path of what a docstring names, `None` if the site does not show it.

    Raises:
        ValueError: If the package has no such thing.
    """
    head, _, rest = name.partition(".")
    if head != "trl_opsd" and rest and head.islower():
        return None  # another library's
    package = of.package
    found = _member(package, rest) if head == "trl_opsd" else _seen_from(of, name) or _only(name, documented)
    if found is None:
        raise ValueError(f"The docstring of {of.path} names `{name}`, which is nowhere.")
    shown = found.path in documented and not any(part.startswith("_") for part in found.path.split("."))
    return found.path if shown else None


def _member(parent: griffe.Object, path: str) -> griffe.Object | None:
    try:
        found = parent[path]
        return found.final_target if found.is_alias else found
    except (KeyError, griffe.GriffeError):
        return None


def _seen_from(of: griffe.Object, name: str) -> griffe.Object | None:
    """What a name means there: a member of it or of what holds it, or what its module imports."""
    scope: griffe.Object | None = of
    while scope is not None:
        if (found := _member(scope, name)) is not None:
            return found
        scope = scope.parent
    return None


def _only(name: str, documented: dict[str, griffe.Object]) -> griffe.Object | None:
    head, _, rest = name.partition(".")
    found = [child for path, child in documented.items() if path.endswith(f".{head}")]
    if len(found) != 1:
        return None
    return _member(found[0], rest) if rest else found[0]
