from .sampled import SampledTextContext


_ASK = """{prompt}

This is an attempt at the problem above:

<<< attempt >>>
{attempt}
<<< end of attempt >>>

The correct final answer is: {answer}

Compare the attempt with it. In a few sentences, say what was done well, where it first went wrong if it did, and \
what to do differently. Do not solve the problem again."""

_REFLECTION = """{prompt}

For your eyes only, a reflection on an earlier attempt at this problem:

<<< reflection >>>
{reflection}
<<< end of reflection >>>

Heed it and solve the problem from the beginning, without mentioning it. Give the final answer in the form the \
problem asks for."""


class ReflectionContext(SampledTextContext):
    """
    The teacher reads what the current policy writes about the rollout when it is shown the right answer.

    Args:
        column (`str`, *optional*, defaults to `"answer"`):
            Dataset column with the answer that the policy is shown.
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and `{reflection}`, besides any
            dataset columns.
        sample_template (`str`, *optional*):
            Text of the last user turn that the policy answers, with the placeholders `{prompt}` and `{attempt}`,
            besides any dataset columns.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Most tokens of the reflection.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature it is sampled at.
    """

    def __init__(
        self,
        column: str = "answer",
        template: str = _REFLECTION,
        sample_template: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
    ):
        asked = _ASK.replace("{answer}", f"{{{column}}}") if sample_template is None else sample_template
        super().__init__("reflection", template, asked, max_new_tokens, temperature, reads_attempt=True)
