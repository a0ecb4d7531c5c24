"""Token pages of a run while it trains."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import gather_object
from transformers import TrainerCallback

from ..files import write_whole
from ..trainer.score import score_rollouts
from .token_page import InspectedRollout, inspected_rollouts, rollout_facts, token_page


if TYPE_CHECKING:
    from ..trainer.batch import Generation
    from ..trainer.trainer import SelfDistillationTrainer

# Most probable tokens of each side
NUM_LISTED = 8


class InspectCallback(TrainerCallback):
    """
    Writes `inspect/step-000050.html` into the output folder every few steps: a few of the rollouts that the step is
    trained on, with what student and teacher say of them when they have been sampled. The page is logged to wandb and
    trackio as an artefact and to TensorBoard as text with its path, where `report_to` has them. Training goes on as it
    would have.

    Example:

    ```python
    >>> from trl_opsd.report import InspectCallback

    >>> trainer.add_callback(InspectCallback(trainer, steps=50))
    ```

    Args:
        trainer ([`SelfDistillationTrainer`]):
            Trainer whose rollouts are shown.
        steps (`int`, *optional*, defaults to `50`):
            Optimizer steps from one page to the next.
        rollouts (`int`, *optional*, defaults to `4`):
            Rollouts of a page, evenly spread over those of the generation, at least one of each process.

    Raises:
        ValueError: If one of them is less than 1.
    """

    def __init__(self, trainer: "SelfDistillationTrainer", steps: int = 50, rollouts: int = 4):
        for name, value in {"steps": steps, "rollouts": rollouts}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self._trainer, self._every, self._num_rollouts = trainer, steps, rollouts
        trainer.observers.append(self._observe)

    def _observe(self, batch: dict[str, Any], generation: "Generation") -> None:
        trainer = self._trainer
        step = self._due()
        if not trainer.model.training or step is None:
            return
        number, num_processes = len(batch["completion_ids"]), trainer.accelerator.num_processes
        rows = np.linspace(0, number - 1, min(number, -(-self._num_rollouts // num_processes)), dtype=int).tolist()
        scored = score_rollouts(trainer, batch, generation, rows, NUM_LISTED)
        facts = rollout_facts(trainer, batch, generation, rows)
        ids = [generation.token_ids[row] for row in rows]
        given = trainer.signals.coefficients, trainer.teacher.knows_entropy, facts
        found = inspected_rollouts(scored, ids, *given)
        found = gather_object(found) if num_processes > 1 else found
        if trainer.accelerator.is_main_process:
            self._write(step, found)

    def _due(self) -> int | None:
        """The step for which a page is due, of those that are trained on this generation."""
        trainer = self._trainer
        micro_batches = trainer.args.steps_per_generation * trainer.num_iterations
        first = trainer.state.global_step + 1
        last = first + max(1, micro_batches // trainer.args.gradient_accumulation_steps) - 1
        step = -(-first // self._every) * self._every
        return step if step <= last else None

    def _write(self, step: int, rollouts: list[InspectedRollout]) -> None:
        trainer: Any = self._trainer
        about = [
            ("step", f"{step:,} of {trainer.state.max_steps:,}"),
            ("scored", "when the rollouts had been sampled, before they were trained on"),
            ("loss", trainer.signals.description),
            ("divergence", trainer.args.objective().description),
            ("privileged context", trainer.args.privileged_context),
            ("teacher", f"{trainer.args.teacher}: {trainer.teacher.description}"),
        ]
        file = Path(trainer.args.output_dir) / "inspect" / f"step-{step:06d}.html"
        page = token_page(f"Rollouts of step {step:,}", rollouts, about, trainer.teacher_prompt.tokenizer)
        try:
            write_whole(file, page)
        except OSError as error:  # no reason to end a run
            warnings.warn(f"The rollouts of step {step} cannot be written to {file}: {error}.", stacklevel=2)
            return
        for log in (_to_wandb, _to_trackio, _to_tensorboard):
            log(trainer, file, step)


def _to_wandb(trainer: Any, file: Path, step: int) -> None:
    if "wandb" not in trainer.args.report_to:
        return
    import wandb

    if wandb.run is not None:
        wandb.run.log_artifact(str(file), name=f"inspect-{wandb.run.id}", type="inspect", aliases=[f"step-{step}"])


def _to_trackio(trainer: Any, file: Path, step: int) -> None:
    if "trackio" not in trainer.args.report_to:
        return
    import trackio

    if hasattr(trackio, "log_artifact"):
        trackio.log_artifact(str(file), name="inspect", type="inspect", aliases=[f"step-{step}"])
    else:
        warnings.warn(f"{file} is not logged: this trackio has no artefacts. Install a newer one.", stacklevel=2)


def _to_tensorboard(trainer: Any, file: Path, step: int) -> None:
    for callback in trainer.callback_handler.callbacks:
        if (writer := getattr(callback, "tb_writer", None)) is not None:
            writer.add_text("inspect", f"`{file.resolve()}`", step)
