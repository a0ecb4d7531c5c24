"""The images beside what the teacher reads, and those in the table of completions."""

from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object

from ..context import TeacherPrompt
from ..data import image_parts
from ..scoring import Images, joined_images


def teacher_images(
    teacher_prompt: TeacherPrompt,
    own: Sequence[Images | None],
    completions: Sequence[Any],
    students: Sequence[Images] | None,
) -> list[Images]:
    """
    Images of each row's prompt and, after them, those that tools returned.

    Args:
        teacher_prompt ([`TeacherPrompt`]):
            Renders the prompts.
        own (`Sequence[Images | None]`):
            Those of the teacher's prompts, `None` for rows without a context.
        completions (`Sequence[Any]`):
            Completions, as text or messages.
        students (`Sequence[Images]`, *optional*):
            Those of the student's rows, whose prompts stand in where there is no context.
    """
    students = students or [{}] * len(own)
    return [
        student if its is None else joined_images([its, teacher_prompt.completion_images(completion)])
        for its, completion, student in zip(own, completions, students, strict=True)
    ]


def log_images(prompts: Sequence[Any], *made: Any, logs: Any) -> tuple[Any, ...]:
    """
    Log the images of rollouts, on every process. GRPOTrainer has those do it whose rows have any, and they would wait
    for the others forever.

    Args:
        prompts (`Sequence[str]` or `Sequence[list[dict[str, Any]]]`):
            Prompts, as text or messages.
        made (`tuple`):
            What GRPOTrainer's `_generate` returns: in the end, the images of each row and those of its tools.
        logs (`deque`, *optional*):
            Where they go, if they are logged.

    Returns:
        `tuple`: the same, with an empty list for rows without images, which processors know, in place of `None`.
    """
    *rest, images, tool_images = made
    if logs is not None:
        parts = [[] if isinstance(prompt, str) else image_parts(prompt) for prompt in prompts]
        own, tools = [[part["image"] for part in its] for its in parts], tool_images or [[]] * len(prompts)
        logs.extend(gather_object([[*its, *of_tools] for its, of_tools in zip(own, tools, strict=True)]))
    return *rest, images and [its or [] for its in images], tool_images
