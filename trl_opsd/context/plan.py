from .sampled import SampledTextContext


_ASK = """{prompt}

This is a reference solution:

<<< reference solution >>>
{solution}
<<< end of reference solution >>>

List its key steps as a short plan that someone could follow who has not seen it. Leave out calculations and \
the final answer."""

_PLAN = """{prompt}

For your eyes only, a plan for this problem:

<<< plan >>>
{plan}
<<< end of plan >>>

Solve the problem yourself along these lines, without mentioning the plan. Give the final answer in the form the \
problem asks for."""


class PlanContext(SampledTextContext):
    """
    The teacher reads the key steps that the current policy extracts from the reference solution, not the solution.

    Args:
        column (`str`, *optional*, defaults to `"solution"`):
            Dataset column with the reference solution that the policy is shown.
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and `{plan}`, besides any dataset
            columns.
        sample_template (`str`, *optional*):
            Text of the last user turn that the policy answers, with the placeholder `{prompt}`, besides any dataset
            columns.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Most tokens of the plan.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature it is sampled at.
    """

    def __init__(
        self,
        column: str = "solution",
        template: str = _PLAN,
        sample_template: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
    ):
        asked = _ASK.replace("{solution}", f"{{{column}}}") if sample_template is None else sample_template
        super().__init__("plan", template, asked, max_new_tokens, temperature)
