"""The images beside what the teacher reads, and those in the table of completions."""

from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object
from trl import GRPOTrainer

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


class LogsImages(GRPOTrainer):
    """
    Has every process log the images of its rollouts. GRPOTrainer has those do it whose rows have any, and they would
    wait for the others forever.
    """

    def _generate(self, prompts: list[Any]) -> Any:
        *made, images, tool_images = super()._generate(prompts)
        self.log_multimodal = False  # GRPOTrainer's
        if self._is_vlm and self.args.log_multimodal:
            parts = [[] if isinstance(prompt, str) else image_parts(prompt) for prompt in prompts]
            own, tools = [[part["image"] for part in its] for its in parts], tool_images or [[]] * len(prompts)
            shown = [[*its, *of_tools] for its, of_tools in zip(own, tools, strict=True)]
            self._logs["images"].extend(gather_object(shown))
        # Processors know rows without images by an empty list
        return *made, images and [its or [] for its in images], tool_images
