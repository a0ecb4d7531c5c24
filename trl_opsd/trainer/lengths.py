"""How prompt and completion share the model's context."""

import warnings

from .config import SelfDistillationConfig


def prompt_budget(args: SelfDistillationConfig, context: int | None) -> int | None:
    """
    Most tokens of a teacher prompt.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration.
        context (`int`, *optional*):
            Tokens that the teacher can read.

    Returns:
        `int`, *optional*:
            `max_teacher_prompt_length`, or what completions leave of the context: at least a half if their length is
            a default.

    Raises:
        ValueError: If that is nothing.
    """
    budget = args.max_teacher_prompt_length
    if context is None:
        return budget
    length = args.max_completion_length or 0
    if args.has_default_completion_length:
        length = max(1, min(length, context - (budget or context // 2)))
    available = context - length
    if available < (budget or 1):
        what = "any prompt" if budget is None else f"`max_teacher_prompt_length={budget}`"
        raise ValueError(
            f"The teacher's context of {context} tokens leaves {max(available, 0)} beside a completion of {length} "
            f"(`max_completion_length`), too little for {what}. Lower `max_completion_length`"
            + (", or leave it unset." if budget is None else " or `max_teacher_prompt_length`.")
        )
    return available if budget is None else budget


def fit_completions(args: SelfDistillationConfig, context: int | None, longest_prompt: int) -> None:
    """
    Shorten completions whose length is a default to what the context leaves beside the prompts, and say so.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration, whose `max_completion_length` may change.
        context (`int`, *optional*):
            Tokens that the teacher can read.
        longest_prompt (`int`):
            Tokens of the longest prompt.
    """
    length = args.max_completion_length
    if (
        context is None
        or length is None
        or not args.has_default_completion_length
        or longest_prompt + length <= context
    ):
        return
    args.max_completion_length = context - longest_prompt
    if args.process_index == 0:
        warnings.warn(
            f"Completions end after {args.max_completion_length} tokens and not {length}: the context of {context} "
            f"tokens leaves no more beside prompts of up to {longest_prompt}. Set `max_completion_length`, or "
            "`max_teacher_prompt_length`, to choose.",
            stacklevel=3,
        )
