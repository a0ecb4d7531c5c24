import math
from collections.abc import Iterable, Mapping
from string import Formatter
from typing import Any


class Template:
    """
    A text with placeholders, `{name}`, for the columns of a row. Literal braces are doubled.

    Args:
        text (`str`):
            The text.
        what (`str`, *optional*, defaults to `"The template"`):
            What error messages call it.

    Raises:
        ValueError: If the text is malformed, or has a placeholder without a name or with a format or conversion.

    Example:
    ```python
    >>> from trl_opsd.data import Template

    >>> Template("{prompt} Use \\\\boxed{{}}.").fill({"prompt": "2 + 2?"})
    '2 + 2? Use \\\\boxed{}.'
    ```
    """

    def __init__(self, text: str, what: str = "The template"):
        self._what = what
        doubled = "Write literal braces doubled: {{ and }}."
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{what} {text!r} is malformed: {error}. {doubled}") from None
        for _, name, spec, conversion in parts:
            if name == "":
                raise ValueError(f"{what} {text!r} has a placeholder without a name. Name a dataset column. {doubled}")
            if spec or conversion:
                raise ValueError(
                    f"{what} {text!r} has a placeholder {{{name}}} with a format or a conversion. Leave the name "
                    "alone."
                )
        self._parts = [(literal, name) for literal, name, _, _ in parts]
        self.names = tuple(dict.fromkeys(name for _, name in self._parts if name is not None))
        """Names of the placeholders, in order."""

    def fill(self, values: Mapping[str, Any], where: str = "the row") -> str:
        """
        The text with values instead of placeholders.

        Args:
            values (`Mapping[str, Any]`):
                A value for each placeholder: text, or what is written as itself, such as a number.
            where (`str`, *optional*, defaults to `"the row"`):
                What error messages call the row.

        Raises:
            ValueError: If a value is missing or is neither.
        """
        # Not `str.format`, which would take the dots and brackets of a column's name for look-ups
        filled = ""
        for literal, name in self._parts:
            filled += literal
            if name is None:
                continue
            value = values[name]
            is_missing = value is None or (isinstance(value, float) and math.isnan(value))
            if is_missing or (isinstance(value, Iterable) and not isinstance(value, str)):
                holds = "nothing" if is_missing else type(value).__name__
                raise ValueError(f"{self._what} needs text, but `{name}` of {where} holds {holds}.")
            filled += str(value)
        return filled
