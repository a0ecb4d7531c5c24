"""The loss of a micro-batch: the teacher's pass, the student's, and the divergence between them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..objective import FusedDivergence, Head, Objective, TopLogProbs, aggregation_weights, fused_divergence
from ..scoring import (
    completion_states,
    cut_by_tokens,
    cut_into,
    evaluation_mode,
    head_of,
    padded_length,
    pays_off,
    unsharded,
    used_width,
)
from ..serving import Scores
from ..teacher import Teacher
from .self_distillation_config import SelfDistillationConfig


class MicroBatchLoss(NamedTuple):
    """
    Result of [`SelfDistillationLoss`].

    Args:
        divergence ([`FusedDivergence`]):
            Of all tokens of the micro-batch that are in the loss, pass by pass. Its `loss` carries the gradient of the
            last pass, that of the others has been accumulated, and is divided by the number of micro-batches.
        passes (`list[dict[str, Any]]`):
            The rows of each pass.
    """

    divergence: FusedDivergence
    passes: list[dict[str, Any]]


class SelfDistillationLoss:
    """
    The loss of a micro-batch.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration.
        accelerator ([`~accelerate.Accelerator`]):
            Of the run.
        teacher ([`Teacher`], *optional*):
            Whose weights score the rollouts. `None` if a server has scored them already.
        objective ([`Objective`]):
            Which divergence, over which tokens.
        can_share_prompts (`bool`):
            Whether the teacher may read a prompt once for several rows.
        pad_to_multiple_of (`int`, *optional*):
            What the widths of prompts and completions are multiples of.
    """

    def __init__(
        self,
        args: SelfDistillationConfig,
        accelerator: Accelerator,
        teacher: Teacher | None,
        objective: Objective,
        can_share_prompts: bool,
        pad_to_multiple_of: int | None,
    ):
        self.teacher = teacher
        self.can_share_prompts = can_share_prompts
        self._args = args
        self._accelerator = accelerator
        self._objective = objective
        self._pad_to_multiple_of = pad_to_multiple_of
        self._is_deepspeed = accelerator.state.deepspeed_plugin is not None
        # Where parameters are gathered, every process has to run as many forward passes
        self._is_sharded = getattr(accelerator.state, "fsdp_plugin", None) is not None or is_deepspeed_zero3_enabled()
        self._forward_redirection = _ForwardRedirection()

    def __call__(
        self, model: nn.Module, inputs: dict[str, Any], num_micro_batches: int, num_generation_batches: int
    ) -> MicroBatchLoss:
        """
        The loss of a micro-batch. In training, the backward passes of all passes but the last are done here.

        Args:
            model (`nn.Module`):
                Policy, wrapped as it is trained.
            inputs (`dict[str, Any]`):
                Micro-batch.
            num_micro_batches (`int`):
                Number of micro-batches accumulated by an optimizer step.
            num_generation_batches (`int`):
                Number of micro-batches that were generated, and whose tokens were counted, together.
        """
        # Weights are those of the whole micro-batch, so the gradients of its passes add up to its gradient. The last
        # pass is left to the caller, who runs the backward pass that synchronises.
        passes = self.passes({**inputs, "loss_weights": self._weights(inputs, num_generation_batches)})
        *early, last = passes
        outputs = []
        for rows in early:
            with self._postponed_synchronisation(model):
                output = self._divergence(model, rows)
                if torch.is_grad_enabled():
                    kwargs = {"scale_wrt_gas": False} if self._is_deepspeed else {}
                    self._accelerator.backward(output.loss / num_micro_batches, **kwargs)
            outputs.append(output._replace(loss=output.loss.detach()))
        outputs.append(self._divergence(model, last))
        loss = torch.stack([output.loss for output in outputs]).sum() / num_micro_batches
        return MicroBatchLoss(FusedDivergence(loss, *map(torch.cat, list(zip(*outputs, strict=True))[1:])), passes)

    def _weights(self, inputs: dict[str, Any], num_generation_batches: int) -> torch.Tensor:
        num_shares = self._accelerator.num_processes * num_generation_batches
        num_tokens = inputs["num_loss_tokens"].clamp(min=1.0) / num_shares
        weights = aggregation_weights(
            inputs["loss_mask"], self._args.loss_type, num_tokens, self._args.max_completion_length
        )
        if "importance_sampling_ratio" in inputs:  # the sampler's policy differs a little from the trainer's
            weights = weights * inputs["importance_sampling_ratio"]
        return weights

    def passes(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """
        The rows of a micro-batch with a token in the loss, cut into what goes through the network at once.

        Args:
            inputs (`dict[str, Any]`):
                Micro-batch.

        Returns:
            `list[dict[str, Any]]`: as many on every process.
        """
        max_tokens = self._args.max_tokens_per_microbatch
        kept = _rows_of(inputs, inputs["loss_mask"].any(dim=1).nonzero().flatten().tolist())
        num_rows = len(kept["loss_mask"])
        passes = [list(range(num_rows))] if num_rows else []
        number = 1
        if max_tokens is not None:
            prompts = torch.maximum(kept["prompt_mask"].sum(1), kept["teacher_prompt_mask"].sum(1)).tolist()
            completions = kept["completion_mask"].sum(1).tolist()
            passes = cut_by_tokens(
                [padded_length(length, self._pad_to_multiple_of) for length in prompts],
                [padded_length(length, self._pad_to_multiple_of) for length in completions],
                kept["teacher_prompt_groups"].tolist(),
                max_tokens,
            )
            number = max(number, len(passes))
            if self._accelerator.num_processes > 1:
                numbers = torch.tensor(number, device=self._accelerator.device)
                number = int(self._accelerator.gather(numbers).max())
                passes = cut_into(passes, number)
        # Forward and backward passes meet in collective operations: a process without as many runs idle ones
        idle = [_idle_row(inputs)] * (number - len(passes))
        return [_rows_of(kept, rows) for rows in passes] + idle

    @contextmanager
    def _postponed_synchronisation(self, model: nn.Module) -> Iterator[None]:
        """Inside, gradients are accumulated as they are in all but the last micro-batch of an optimizer step."""
        accelerator = self._accelerator
        if not accelerator.sync_gradients:
            yield
            return
        # As `Trainer` decides for its micro-batches. `backward` reads the flag and has DeepSpeed's engine step by it.
        synchronises = self._is_deepspeed or accelerator.gradient_state.plugin_kwargs.get("sync_each_batch")
        accelerator.sync_gradients = False
        try:
            with nullcontext() if synchronises else accelerator.no_sync(model):
                yield
        finally:
            accelerator.sync_gradients = True

    def _divergence(self, model: nn.Module, inputs: dict[str, Any]) -> FusedDivergence:
        num_completion_tokens = used_width(inputs["completion_mask"], "right", self._pad_to_multiple_of)
        completion_ids = inputs["completion_ids"][:, :num_completion_tokens]
        completion_mask = inputs["completion_mask"][:, :num_completion_tokens]
        selected = inputs["loss_mask"][:, :num_completion_tokens].bool()

        def with_prompt(prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            width = used_width(prompt_mask, "left", self._pad_to_multiple_of)
            ids = torch.cat([prompt_ids[:, -width:], completion_ids], dim=1)
            return ids, torch.cat([prompt_mask[:, -width:], completion_mask], dim=1)

        token_ids = completion_ids[selected]
        teacher_states: torch.Tensor | TopLogProbs
        teacher_head: Head | None
        if self.teacher is not None:
            teacher_states, teacher_head = self.teacher_states(
                model,
                *with_prompt(inputs["teacher_prompt_ids"], inputs["teacher_prompt_mask"]),
                selected,
                inputs["teacher_prompt_groups"],
            )
        else:
            top_tokens, top_log_probs, log_probs = (
                inputs[f"teacher_{name}"][:, :num_completion_tokens][selected] for name in Scores._fields
            )
            teacher_states, teacher_head = TopLogProbs(top_tokens.long(), top_log_probs, token_ids, log_probs), None
        student = self._accelerator.unwrap_model(model)
        # The whole computation runs inside the wrapped model's forward, so that DDP, FSDP2 and ZeRO-3 see it
        return self._forward_redirection(
            model,
            student,
            self._student_divergence,
            student,
            *with_prompt(inputs["prompt_ids"], inputs["prompt_mask"]),
            selected,
            teacher_states,
            teacher_head,
            token_ids,
            inputs["loss_weights"][:, :num_completion_tokens][selected],
        )

    def teacher_states(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        selected: torch.Tensor,
        groups: torch.Tensor,
    ) -> tuple[torch.Tensor, Head]:
        """
        The teacher's hidden states that predict the selected completion tokens, and its head.

        Args:
            model (`nn.Module`):
                Policy, wrapped as it is trained.
            input_ids (`torch.Tensor` of shape `(B, P + T)`):
                Left-padded teacher prompts and right-padded completions.
            attention_mask (`torch.Tensor` of shape `(B, P + T)`):
                1 for tokens, 0 for padding.
            selected (`torch.Tensor` of shape `(B, T)`, bool):
                The completion tokens.
            groups (`torch.Tensor` of shape `(B,)`):
                The same number for rows with the same prompt.

        Returns:
            `tuple[torch.Tensor, Head]`: states of shape `(number of selected tokens, H)`, without a gradient.
        """
        assert self.teacher is not None
        shared_groups = groups if self._should_share_prompts(input_ids, selected.size(1), groups) else None
        with torch.no_grad(), self.teacher.weights(model) as module:
            teacher = self._accelerator.unwrap_model(module)
            with evaluation_mode(teacher):
                hidden = self._forward_redirection(
                    module,
                    teacher,
                    self._states,
                    teacher,
                    input_ids,
                    attention_mask,
                    selected,
                    shared_groups,
                )
            return hidden, head_of(teacher)

    def _states(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        selected: torch.Tensor,
        shared_groups: torch.Tensor | None = None,
    ) -> torch.Tensor:
        with self._accelerator.autocast():  # inside the wrapped model's forward, which may have an opinion of its own
            return completion_states(model, input_ids, attention_mask, selected, shared_groups)

    def _should_share_prompts(self, input_ids: torch.Tensor, completion_width: int, groups: torch.Tensor) -> bool:
        if not self.can_share_prompts:
            return False
        prompt_width = input_ids.size(1) - completion_width
        num_shared = len(groups.unique()) * prompt_width + len(groups) * completion_width
        counts = torch.tensor([[input_ids.numel(), num_shared]], device=self._accelerator.device)
        if self._is_sharded:
            counts = self._accelerator.gather(counts)  # all wait for the slowest
        return pays_off(*counts.amax(dim=0).tolist())

    def _student_divergence(
        self,
        student: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        selected: torch.Tensor,
        teacher_states: torch.Tensor | TopLogProbs,
        teacher_head: Head | None,
        token_ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> FusedDivergence:
        student_hidden = self._states(student, input_ids, attention_mask, selected)
        student_head = head_of(student)
        heads = [student_head.weight, student_head.bias]
        if teacher_head is not None:
            heads += [teacher_head.weight, teacher_head.bias]
        with maybe_gather_lm_head_ctx(*heads), self._accelerator.autocast():
            student_head = unsharded(student_head)
            return fused_divergence(
                student_hidden.to(student_head.weight.device),
                teacher_states.to(student_head.weight.device),
                student_head,
                None if teacher_head is None else unsharded(teacher_head),
                token_ids,
                weights,
                self._objective,
                memory_budget=self._args.divergence_memory,
                kernel=self._args.divergence_kernel,
            )


def _rows_of(inputs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some rows of a micro-batch. What is no tensor of rows belongs to all of them."""
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and value.ndim > 0 else value
        for name, value in inputs.items()
    }


def _idle_row(inputs: dict[str, Any]) -> dict[str, Any]:
    """The shortest row of a micro-batch, with no token of it in the loss."""
    lengths = inputs["prompt_mask"].sum(1) + inputs["completion_mask"].sum(1)
    row = _rows_of(inputs, [int(lengths.argmin())])
    return {**row, "loss_mask": torch.zeros_like(row["loss_mask"])}
