import re
from itertools import groupby
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_model_param_count


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


def describe_run(trainer: "SelfDistillationTrainer", max_steps: int) -> list[tuple[str, str]]:
    """
    Describe what a run trains, and on what.

    Args:
        trainer ([`SelfDistillationTrainer`]):
            Trainer of the run.
        max_steps (`int`):
            Number of optimizer steps.

    Returns:
        `list[tuple[str, str]]`:
            Names and values, in the order to read them.
    """
    args: Any = trainer.args
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    is_lora = is_peft_model(model)
    trainable, total = get_model_param_count(model, trainable_only=True), get_model_param_count(model)
    name = model.config.name_or_path or type(model).__name__

    context = args.privileged_context
    if args.context_kwargs:
        context += f" ({', '.join(f'{key}={value!r}' for key, value in args.context_kwargs.items())})"
    if args.use_vllm:
        engine = f"vLLM, {args.vllm_mode}"
    elif args.use_transformers_continuous_batching:
        engine = "transformers, continuous batching"
    else:
        engine = "transformers"
    rollouts = f"{args.num_generations}, up to {args.max_completion_length} tokens"
    if trainer.completion_source.description:
        rollouts += f"; {trainer.completion_source.description}"
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    return [
        ("student", name),
        ("trainable parameters", f"{trainable:,} of {total:,} ({'LoRA' if is_lora else 'full'})"),
        ("teacher", f"{args.teacher}: {trainer.teacher.description}"),
        ("privileged context", context),
        ("loss", trainer.signals.description),
        ("divergence", args.objective().description),
        ("clip", "none" if args.divergence_clip is None else f"{args.divergence_clip:g} per vocabulary entry"),
        ("rollouts per prompt", rollouts),
        ("rollout engine", f"{engine}, temperature {args.temperature:g}"),
        ("steps", f"{max_steps:,}, of {sequences:,} rollouts each"),
    ]
