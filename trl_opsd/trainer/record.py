"""What a run leaves beside its checkpoints, for whoever looks at it: what it is, and its log."""

import dataclasses
import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_model_param_count

from ..files import TRAINING_RECORD, write_whole
from ..help import versions_of


if TYPE_CHECKING:
    from .trainer import SelfDistillationTrainer


_PACKAGES = ("trl-opsd", "trl", "transformers", "torch", "accelerate", "peft", "datasets", "vllm", "deepspeed")
# Seconds between two writings of the log, which grows with the run
_PAUSE = 30.0


class RunRecord(TrainerCallback):
    """
    Keeps in the output folder what a run is (`training_run.json`: method, settings with the defaults that they differ
    from, versions, what guards said; an entry for each time it was begun or resumed) and what it has logged so far
    (`trainer_state.json`, as in checkpoints, at most every 30 seconds and at the end).

    Args:
        trainer ([`SelfDistillationTrainer`]):
            Trainer of the run.

    Attributes:
        inputs (`list[Any]`):
            Dataclasses with further settings: the data and the model that a command was given.
    """

    def __init__(self, trainer: "SelfDistillationTrainer"):
        self._trainer = trainer
        self._written: float | None = None  # before training, the log is of another run
        self._record: dict[str, Any] = {}
        self.inputs: list[Any] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self._written = -_PAUSE
        sessions = _sessions(Path(args.output_dir) / TRAINING_RECORD) if state.global_step else []
        self._record = {
            "method": None if args.method is None else dataclasses.asdict(args.method),
            "config": type(args).__name__,
            "summary": describe_run(self._trainer, state.max_steps),
            "sessions": [*sessions, self._session(args, state)],
        }
        self._write_record(args)

    def on_log(self, args, state, control, **kwargs):
        if self._written is not None and time.monotonic() - self._written >= _PAUSE:
            self._write_log(args, state)

    def on_evaluate(self, args, state, control, **kwargs):
        self._write_log(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._write_log(args, state)

    def _write_log(self, args: Any, state: TrainerState) -> None:
        if self._written is None or not state.is_world_process_zero:
            return
        self._written = time.monotonic()
        self._write_record(args)  # with what guards have said
        text = json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True)
        write_whole(Path(args.output_dir) / TRAINER_STATE_NAME, text + "\n")

    def _write_record(self, args: Any) -> None:
        self._record["sessions"][-1]["guards"] = self._trainer.guards.messages
        text = json.dumps(self._record, indent=2, default=str)
        write_whole(Path(args.output_dir) / TRAINING_RECORD, text + "\n")

    def _session(self, args: Any, state: TrainerState) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        defaults: dict[str, Any] = {}
        for config in (args, *self.inputs):
            its = _settings(config)
            settings |= its
            chosen = getattr(config, "chosen", its)
            for name, value in _defaults(config).items():
                if name in chosen and name in its and its[name] != value:
                    defaults[name] = value
        device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device
        return {
            "step": state.global_step,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": settings,
            "defaults": defaults,
            "versions": versions_of(_PACKAGES),
            "devices": f"{args.world_size} × {device}",
        }


def _sessions(file: Path) -> list[Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError, TypeError):  # those before are not known, which is no reason to fail
        return []


def _settings(config: Any) -> dict[str, Any]:
    """Fields and values, as they come back from a file."""
    if hasattr(config, "to_dict"):
        values = config.to_dict()
    else:
        values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return json.loads(json.dumps({name: values[name] for name in values if not name.endswith("_token")}, default=str))


def _defaults(config: Any) -> Mapping[str, Any]:
    defaults = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return json.loads(json.dumps(defaults, default=str))


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
        engine = f"vLLM, {args.vllm_mode}, sent {trainer.sampler.sent}"
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
