"""Parts by name: a shipped one, or a class of the user's by its import path, with its keyword arguments."""

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

from .help import did_you_mean


def import_object(path: str) -> Any:
    """
    Import what an import path names. Modules in the working directory can be imported.

    Args:
        path (`str`):
            Module and attribute, such as `"my_project.contexts.Hint"`.

    Raises:
        ImportError: If there is no such module, or no such attribute in it.
    """
    module, _, attribute = path.rpartition(".")
    if not module or path.startswith("."):
        raise ImportError(f"{path!r} is no import path, such as 'package.module.name'")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise ImportError(str(error)) from error


def make_part(slot: str, name: str, kwargs: Mapping[str, Any] | None, shipped: Mapping[str, type | str]) -> Any:
    """
    Construct a part.

    Args:
        slot (`str`):
            Field of the configuration that names the part, for error messages.
        name (`str`):
            One of `shipped`, or the import path of a class. Modules in the working directory can be imported.
        kwargs (`Mapping[str, Any]`, *optional*):
            Keyword arguments of the class.
        shipped (`Mapping[str, type | str]`):
            Classes of the library by name, or their import paths.

    Returns:
        `Any`: the part.

    Raises:
        ValueError: If there is no such part, if the path cannot be imported, or if the class does not take `kwargs`.
    """
    given = f"`{slot}={name!r}`"
    found: Any = shipped.get(name, name)
    if isinstance(found, str):
        if found == name and ("." not in name or name.startswith(".")):
            hint = did_you_mean(name, shipped, "Choose one of them, or give such a path.")
            raise ValueError(f"{given} is none of {list(shipped)}, nor the import path of a class. {hint}")
        try:
            found = import_object(found)
        except ImportError as error:
            raise ValueError(f"{given} cannot be imported: {error}.") from error
    if not callable(found):
        raise ValueError(f"{given} is of type {type(found).__name__}, not a class.")
    try:
        return found(**(kwargs or {}))
    except TypeError as error:
        raise ValueError(
            f"The arguments {dict(kwargs or {})} do not fit {given}, which takes {_signature(found)}: {error}."
        ) from error


def _signature(found: Any) -> str:
    try:
        return str(inspect.signature(found))
    except ValueError:  # some built-in ones have none
        return "arguments of its own"
