from .template import TemplateContext


class ColumnContext(TemplateContext):
    """A template that must have the placeholder of one dataset column."""

    def __init__(self, column: str, template: str):
        super().__init__(template)
        self.column = column
        if column not in self.columns:
            raise ValueError(
                f"The template {template!r} has no '{{{column}}}', so the teacher would not read that column. Add it, "
                "or name the column it uses."
            )


_SOLUTION = """{prompt}

For your eyes only, this is a reference solution.

<<< reference solution >>>
{solution}
<<< end of reference solution >>>

Work through it until you see why each step holds. Then set it aside and solve the problem yourself: do not copy or \
paraphrase it, reach the same answer by reasoning in your own words, try out ideas, and go back where one fails. \
Give the final answer in the form the problem asks for."""

_ANSWER = """{prompt}

For your eyes only, the correct final answer is: {answer}

Solve the problem yourself: find reasoning of your own that leads there, try out ideas, and go back where one fails. \
Give the final answer in the form the problem asks for."""


class SolutionContext(ColumnContext):
    """
    The teacher reads the reference solution, as in [OPSD](https://huggingface.co/papers/2601.18734).

    Args:
        column (`str`, *optional*, defaults to `"solution"`):
            Dataset column with the reference solution.
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and `{<column>}`. Defaults to
            wording that asks the teacher to understand the solution and to derive the same answer in its own words.
    """

    def __init__(self, column: str = "solution", template: str | None = None):
        super().__init__(column, _SOLUTION.replace("{solution}", f"{{{column}}}") if template is None else template)


class AnswerContext(ColumnContext):
    """
    The teacher reads only the final answer, the leanest of the contexts compared in the study of [how
    self-distillation can degrade reasoning](https://huggingface.co/papers/2603.24472).

    Args:
        column (`str`, *optional*, defaults to `"answer"`):
            Dataset column with the final answer.
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and `{<column>}`.
    """

    def __init__(self, column: str = "answer", template: str | None = None):
        super().__init__(column, _ANSWER.replace("{answer}", f"{{{column}}}") if template is None else template)
