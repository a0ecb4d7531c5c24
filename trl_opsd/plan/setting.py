"""A run that is planned: its configuration, models, accelerators and lengths."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ..signal import Signals
from ..trainer.config import SelfDistillationConfig
from ..trainer.several import each_teacher
from ..trainer.signals import make_signals
from .hardware import GPU
from .models import Model
from .passes import Pass, Reading, Rows, measure
from .sharding import Sharding


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Lengths(NamedTuple):
    """
    Tokens of the longest row.

    Args:
        prompt (`int`):
            What the student reads.
        teacher_prompt (`int`):
            What the teacher reads, context included.
        completion (`int`):
            A completion.
    """

    prompt: int
    teacher_prompt: int
    completion: int


@dataclass(frozen=True, eq=False)
class Setting:
    """
    All that a plan depends on.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration, as that many processes have it.
        gpu ([`GPU`]):
            Each accelerator.
        num_gpus (`int`):
            How many train.
        sharding ([`Sharding`]):
            What each process holds.
        policy ([`Model`]):
            Policy.
        lengths ([`Lengths`]):
            Longest rows.
        externals (`Mapping[str | None, Model]`, *optional*):
            Teachers that are other models, by their names. That of a single one is `None`.
        server_gpus (`int`, *optional*, defaults to `1`):
            GPUs of a vLLM server that samples.
        mean_completion (`int`, *optional*):
            Tokens of a completion in the mean, by which time is planned. `None` for the longest.
    """

    args: SelfDistillationConfig
    gpu: GPU
    num_gpus: int
    sharding: Sharding
    policy: Model
    lengths: Lengths
    externals: Mapping[str | None, Model] = field(default_factory=dict)
    server_gpus: int = 1
    mean_completion: int | None = None

    def with_args(self, **values: Any) -> "Setting":
        """The same with other fields of the configuration. Fields that follow from others have to be given too."""
        args = copy.copy(self.args)
        for name, value in values.items():
            setattr(args, name, value)
        return replace(self, args=args)

    @cached_property
    def each(self) -> "dict[str | None, Setting]":
        """The same with each of its teachers alone, by their names."""
        if self.args.teacher != "several":
            return {None: self}
        externals: dict[str | None, dict[str | None, Model]] = {
            name: {None: one} for name, one in self.externals.items()
        }
        return {
            name: replace(self, args=args, externals=externals.get(name, {}))
            for name, args in each_teacher(self.args).items()
        }

    @property
    def readers(self) -> "list[Setting]":
        """Those whose teacher has weights here."""
        return [one for one in self.each.values() if one.args.teacher_server_base_url is None]

    @property
    def external(self) -> Model | None:
        """The one teacher, if it is another model."""
        return self.externals.get(None)

    @cached_property
    def signals(self) -> Signals:
        """The parts of the method."""
        return make_signals(self.args)

    @property
    def precision(self) -> str:
        """`"bf16"`, `"fp16"` or `"no"`."""
        args = self.args
        return "bf16" if args.bf16 else "fp16" if args.fp16 else self.sharding.mixed_precision

    @property
    def converts_weights(self) -> bool:
        """Whether weights are in half precision when layers see them, whatever they were loaded in."""
        return self.precision != "no" and (self.sharding.stage > 0 or self.sharding.kind == "fsdp2")

    @property
    def is_accumulating(self) -> bool:
        """Whether gradients of earlier passes are there."""
        return self.args.gradient_accumulation_steps > 1 or self.num_passes > 1

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher's states take part in the loss."""
        return self.args.divergence_coef != 0.0

    @property
    def reads_teacher(self) -> bool:
        """Whether a teacher's weights read rollouts here."""
        return self.signals.needs_context and bool(self.readers)

    @property
    def copies_teacher(self) -> bool:
        """Whether the teacher is a copy of the policy, or of its adapter."""
        args = self.args
        if self.external is not None or args.teacher_server_base_url is not None or args.teacher == "live":
            return False
        return not (self.is_lora and args.teacher == "initial")

    @property
    def is_lora(self) -> bool:
        """Whether an adapter is trained."""
        return self.policy.peft_config is not None

    @cached_property
    def teacher(self) -> Model:
        """The network that reads in the teacher's place."""
        if self.external is None and self.is_lora and self.args.teacher == "initial":
            return self.policy.variant(peft_config=None, is_trained=False)  # the adapter switched off
        if self.copies_teacher and not self.is_lora:
            return self.policy.variant(is_trained=False)
        return self.external or self.policy

    @cached_property
    def rows_per_pass(self) -> int:
        """Rows that go through the network at once, all being as long as the longest."""
        most, limit = self.args.per_device_train_batch_size, self.args.max_tokens_per_microbatch
        if limit is None:
            return most
        lengths = self.lengths
        row = max(lengths.prompt, lengths.teacher_prompt) + lengths.completion
        return max(1, min(most, limit // row))

    @property
    def num_passes(self) -> int:
        """Passes of a micro-batch."""
        return -(-self.args.per_device_train_batch_size // self.rows_per_pass)

    @property
    def student_rows(self) -> Rows:
        """What the student reads at once: as many rows as the teacher, whose prompts are longer."""
        student, teacher = self._rows(self.lengths.prompt), self.teacher_rows
        if self.lengths.prompt > self.lengths.teacher_prompt:
            return student
        return student._replace(number=teacher.number, prompt=self.lengths.prompt)

    @property
    def teacher_rows(self) -> Rows:
        """What the teacher reads at once."""
        return self._rows(self.lengths.teacher_prompt)

    def _rows(self, prompt: int) -> Rows:
        """The rows of a pass, of which there may be more where some are shorter than the longest."""
        most, limit = self.args.per_device_train_batch_size, self.args.max_tokens_per_microbatch
        completion = self.lengths.completion
        fitting = most if limit is None else min(most, limit // (prompt + completion))
        if limit is None or fitting == most:
            return Rows(most, prompt, completion)
        shorter = Rows(fitting + 1, max(0, limit // (fitting + 1) - completion), min(completion, limit))
        longest = Rows(max(1, fitting), prompt, completion)
        return max(longest, shorter, key=lambda rows: rows.num_tokens)

    @property
    def rows_per_step(self) -> int:
        """Rollouts that each process learns from in an optimizer step."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps

    @property
    def rows_per_generation(self) -> int:
        """Rollouts that each process samples at once."""
        return self.args.per_device_train_batch_size * self.args.steps_per_generation

    def student_pass(self) -> Pass:
        """What the student's forward and backward pass take."""
        kwargs = self.args.gradient_checkpointing_kwargs or {}
        reentrant = bool(kwargs.get("use_reentrant")) or (self.is_lora and self.sharding.stage == 3)
        recomputes = bool(self.args.gradient_checkpointing)
        return measure(self.policy, self._reading(self.student_rows, True, recomputes, recomputes and reentrant))

    def teacher_pass(self) -> Pass:
        """What the teacher's pass takes."""
        return measure(self.teacher, self._reading(self.teacher_rows, False))

    def prefill(self) -> Pass:
        """What reading the prompts takes that transformers goes on from."""
        rows = Rows(self.rows_per_generation, self.lengths.prompt, 1)
        return measure(self.policy, self._reading(rows, False))

    def _reading(self, rows: Rows, learns: bool, recomputes: bool = False, reentrant: bool = False) -> Reading:
        dtype = HALF[self.precision] if self.converts_weights else None
        autocasts = self.precision != "no" and self.sharding.stage == 0
        return Reading(rows, dtype, autocasts, learns, recomputes, reentrant)
