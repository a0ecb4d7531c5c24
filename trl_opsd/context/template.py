import string
from collections.abc import Mapping
from typing import Any

from .base import Message, Rollouts, as_text, last_user_turn


class TemplateContext:
    """
    Rewrites the last user turn of the prompt through a template. System turns and history stay as they are.

    The base of all contexts that only need the row, and a context of its own: `privileged_context="template"` with
    `context_kwargs={"template": "{prompt}\\n\\nA colleague noted: {hint}"}`.

    Args:
        template (`str`):
            Text of the teacher's last user turn. `{prompt}` stands for the student's, any other placeholder for the
            dataset column of that name. Literal braces are doubled.

    Raises:
        ValueError: If the template is malformed, lacks `{prompt}`, or has a placeholder with a format.
    """

    def __init__(self, template: str):
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"The template {template!r} is malformed ({error}). Double literal braces.") from None
        names = [name for _, name, _, _ in parts if name is not None]
        if "prompt" not in names:
            raise ValueError(
                f"The template {template!r} has no '{{prompt}}', so the teacher would never read the question. Add it."
            )
        if "" in names:
            raise ValueError(
                f"The template {template!r} has a placeholder without a name. Name a dataset column, or double "
                "literal braces."
            )
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise ValueError(f"The template {template!r} has a placeholder with a format or a conversion. Remove it.")
        self.template = template
        self._parts = [(literal, name) for literal, name, _, _ in parts]
        self.columns = tuple(dict.fromkeys(name for name in names if name != "prompt"))

    def teacher_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message]:
        messages = as_text(row["prompt"])
        turn = last_user_turn(messages)
        values = {**row, "prompt": messages[turn]["content"]}
        # Not `str.format`, which would take the dots and brackets of a column's name for look-ups
        text = "".join(literal + ("" if name is None else str(values[name])) for literal, name in self._parts)
        messages[turn] = {**messages[turn], "content": text}
        return messages
