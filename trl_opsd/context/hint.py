from .solution import ColumnContext


_HINT = """{prompt}

For your eyes only, a hint: {hint}

Solve the problem yourself and let the hint guide you, without mentioning it. Give the final answer in the form the \
problem asks for."""


class HintContext(ColumnContext):
    """
    The teacher reads a hint.

    Args:
        column (`str`, *optional*, defaults to `"hint"`):
            Dataset column with the hint.
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and `{<column>}`.
    """

    def __init__(self, column: str = "hint", template: str | None = None):
        super().__init__(column, _HINT.replace("{hint}", f"{{{column}}}") if template is None else template)
