from collections.abc import Mapping
from typing import Any

from ..data import Template
from .base import Message, as_text, last_user_turn
from .rollouts import Rollouts


class TextContext:
    """
    Rewrites the last user turn of the prompt through a template. System turns and history stay as they are. The base
    of all shipped contexts.

    Args:
        template (`str`):
            Text of the teacher's last user turn. `{prompt}` stands for the student's, the names in `given` for what
            the context has to say, any other placeholder for the dataset column of that name. Literal braces are
            doubled.
        given (`str`):
            Names of placeholders that the template must have besides `prompt` and that are no columns.

    Raises:
        ValueError: If the template is malformed, lacks `{prompt}` or a given one, or has a placeholder with a format.
    """

    reads_rollouts = False

    def __init__(self, template: str, *given: str):
        self.template = template
        self._filler = Template(template)
        for name, what in (("prompt", "the question"), *((name, "what the context has to say") for name in given)):
            if name not in self._filler.names:
                raise ValueError(
                    f"The template {template!r} has no '{{{name}}}', so {what} would never be read. Add it."
                )
        self.columns = tuple(name for name in self._filler.names if name not in ("prompt", *given))

    def rewritten(self, row: Mapping[str, Any], **given: str) -> list[Message]:
        """The row's prompt with its last user turn rewritten."""
        messages = as_text(row["prompt"])
        turn = last_user_turn(messages)
        text = self._filler.fill({**row, **given, "prompt": messages[turn]["content"]})
        messages[turn] = {**messages[turn], "content": text}
        return messages


class TemplateContext(TextContext):
    """
    The last user turn through a template of the row's columns: the base of all contexts that only need the row, and a
    context of its own, `privileged_context="template"` with
    `context_kwargs={"template": "{prompt}\\n\\nA colleague noted: {hint}"}`.

    Args:
        template (`str`):
            Text of the teacher's last user turn. `{prompt}` stands for the student's, any other placeholder for the
            dataset column of that name. Literal braces are doubled.

    Raises:
        ValueError: If the template is malformed, lacks `{prompt}`, or has a placeholder with a format.
    """

    def __init__(self, template: str):
        super().__init__(template)

    def teacher_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message]:
        return self.rewritten(row)
