import re
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..trainer.record import describe_run


if TYPE_CHECKING:
    from trl_opsd import SelfDistillationTrainer


class PromptPreviewCallback(TrainerCallback):
    """
    Shows, once before training, one student prompt and one teacher prompt exactly as the model reads them, and a table
    of who is trained by whom.

    Args:
        trainer ([`SelfDistillationTrainer`]):
            Trainer whose run is shown.
        console ([`~rich.console.Console`], *optional*):
            Where to print. The standard output if `None`.

    Example:
    ```python
    >>> from trl_opsd.report import PromptPreviewCallback

    >>> trainer.add_callback(PromptPreviewCallback(trainer))
    ```
    """

    def __init__(self, trainer: "SelfDistillationTrainer", console: Console | None = None):
        self.trainer = trainer
        self.console = console

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        console = self.console or Console()
        # A progress bar may have begun the line.
        console.print()
        student_ids, teacher_ids = self.trainer.preview_prompts()
        self._print_prompt(console, "Student prompt", student_ids)
        if teacher_ids is None:
            console.print(Rule("Teacher prompt"))
            console.print(
                "None for this row before training: its privileged context needs the student's rollouts or what the "
                "student writes for it, or leaves the row out."
            )
        else:
            self._print_prompt(console, "Teacher prompt", teacher_ids)
        table = Table("", "", title="Who trains whom", show_header=False)
        for name, value in describe_run(self.trainer, state.max_steps):
            table.add_row(name, Text(value))
        console.print(table)

    def _print_prompt(self, console: Console, title: str, ids: list[int]) -> None:
        prompt = self.trainer.teacher_prompt
        tokenizer: Any = prompt.tokenizer
        decoded = "".join(
            f"[image, {len(some)} tokens]"
            if is_image
            else str(tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for is_image, some in (
                (is_image, list(run)) for is_image, run in groupby(ids, lambda token: token == prompt.image_token_id)
            )
        )
        # A terminal would act on control characters instead of showing them.
        text = Text(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda match: f"\\x{ord(match[0]):02x}", decoded))
        text.highlight_words(tokenizer.all_special_tokens, style="bold cyan")
        console.print(Rule(f"{title}, {len(ids)} tokens, first training row"))
        # Unwrapped, so that no line break is shown that the model does not read.
        console.print(text, soft_wrap=True)
