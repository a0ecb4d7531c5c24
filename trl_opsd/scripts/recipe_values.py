"""Values of a recipe file, held to the types of their fields as those of flags are."""

import re
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


class _Loader(yaml.SafeLoader):
    pass


_NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
# YAML 1.1 takes 1e-7, without a dot, and 1.0e7, without a sign in the exponent, for text
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(_NUMBER.removesuffix("?") + "$"), list("-+.0123456789")
)


def read_recipe(path: str) -> dict[str, Any]:
    """
    Read a recipe file.

    Args:
        path (`str`):
            YAML file.

    Returns:
        `dict[str, Any]`:
            Its fields. In mappings, `1e-7` is a number. A field by itself has YAML 1.1's value: [`recipe_value`] knows
            whether it is one.

    Raises:
        ValueError: If the file is not a YAML mapping.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        values, with_numbers = yaml.safe_load(text), yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"The file of `--config` is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"The file of `--config`, {path}, must be a mapping of fields to values.")
    return {key: with_numbers[key] if isinstance(value, dict) else value for key, value in values.items()}


def field_types(dataclass_types: list[Any]) -> dict[str, Any]:
    """
    The type of each field.

    Args:
        dataclass_types (`list`):
            Dataclasses.

    Returns:
        `dict[str, Any]`:
            Types by name. A field whose default is `None` admits it, whatever its annotation says.
    """
    found = {}
    for dataclass_type in dataclass_types:
        hints = get_type_hints(dataclass_type)
        for field in fields(dataclass_type):
            hint = hints[field.name]
            found[field.name] = hint | None if field.default is None else hint
    return found


def recipe_value(name: str, value: Any, hint: Any) -> Any:
    """
    A value as the parser takes it for a default. Text is converted later, as that of a flag.

    Args:
        name (`str`):
            Name of the field.
        value (`Any`):
            Value from a recipe.
        hint (`Any`):
            Type of the field.

    Returns:
        `Any`:
            The value, or its text for a field of text.

    Raises:
        ValueError: If it does not have the type of the field.
    """
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"`{name}` must be one of {', '.join(map(str, get_args(hint)))}, got {value!r}.")
        return value
    admitted = {get_origin(one) or one for one in get_args(hint) if get_origin(hint) in (Union, UnionType)}
    admitted = admitted or {get_origin(hint) or hint}
    if float in admitted:
        admitted.add(int)
    numbers = list[float] in (hint, *get_args(hint)) and isinstance(value, list)
    if numbers and all(re.fullmatch(_NUMBER, str(item)) for item in value):
        return [float(item) for item in value]
    if isinstance(value, str) or (type(value) in admitted and not numbers) or Any in admitted:
        return value
    if str in admitted and value is not None and not isinstance(value, dict | list):
        return str(value)
    raise ValueError(f"`{name}` must be of type {getattr(hint, '__name__', hint)}, got {value!r}.")
