"""The images beside what the teacher reads."""

from collections.abc import Sequence
from typing import Any

from ..context import TeacherPrompt
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
