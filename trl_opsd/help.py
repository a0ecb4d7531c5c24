"""What commands and errors say of names: help from docstrings, the known name that comes closest, versions."""

import re
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from inspect import cleandoc
from types import MappingProxyType
from typing import TypeVar


_Class = TypeVar("_Class", bound=type)

_ENTRY = re.compile(r"^( *)(\w+) \(`.*\):\n((?:(?:\1 +.*)?\n)+)", re.MULTILINE)


def help_from_docstring(cls: _Class) -> _Class:
    """
    Class decorator, to be written above `@dataclass`: gives each field that the class defines its entry in the class's
    docstring as help, in plain text. Inherited fields keep theirs.

    Args:
        cls (`type`):
            Dataclass whose docstring has entries in TRL's form.

    Returns:
        `type`:
            The same class.
    """
    own = vars(cls).get("__annotations__", {})
    # `python -OO` leaves no docstrings
    entries = {name: text for _, name, text in _ENTRY.findall(cleandoc(cls.__doc__ or "") + "\n")}
    for field in fields(cls):
        if field.name in own and field.name in entries:
            field.metadata = MappingProxyType({**field.metadata, "help": _plain(entries[field.name])})
    return cls


def _plain(markdown: str) -> str:
    text = " ".join(markdown.split())
    text = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"\1", text)
    text = re.sub(r"\[([^]]+)\]\((http[^)]+)\)", r"\1 (\2)", text)
    text = re.sub(r'`"([^"`]*)"`', r"'\1'", text)
    return text.replace("%", "%%")  # argparse formats it


def listed(names: Iterable[str]) -> str:
    """Names in an error: each as code, with commas."""
    return ", ".join(f"`{name}`" for name in names)


def versions_of(packages: Iterable[str]) -> dict[str, str | None]:
    """Versions of packages, `None` for those that are not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """
    The end of an error about an unknown name.

    Args:
        name (`str`):
            What was written.
        known (`Iterable[str]`):
            What can be written.
        otherwise (`str`, *optional*, defaults to `""`):
            What to say if nothing comes close. By default all that is known.

    Returns:
        `str`:
            A sentence.
    """
    known = list(known)
    close = get_close_matches(name, known, n=1)
    return f"Did you mean `{close[0]}`?" if close else otherwise or f"Choose from: {', '.join(known)}."
