"""The loss of a micro-batch: the teacher's pass, the student's, and what is made of their logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..objective import (
    FusedDivergence,
    Head,
    Objective,
    TopLogProbs,
    aggregation_weights,
    fused_divergence,
    share_of_rows,
    token_log_probs,
)
from ..scoring import (
    can_pack,
    causal_lm,
    check_logits,
    check_packing,
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
from ..teacher import Teacher
from .config import SelfDistillationConfig


# From some rows, and a function that gives log-probabilities of their completions and entropies, both of shape (B, T):
# a loss, and its derivative with respect to each log-probability, with the sign turned.
PolicyTerm = Callable[
    [dict[str, Any], Callable[[], tuple[torch.Tensor, torch.Tensor]]], tuple[torch.Tensor, torch.Tensor]
]


class MicroBatchLoss(NamedTuple):
    """
    Result of [`SelfDistillationLoss`].

    Args:
        loss (`torch.Tensor`):
            Scalar, divided by the number of micro-batches. It carries the gradient of the last pass; that of the
            others has been accumulated.
        divergence ([`FusedDivergence`]):
            Of all tokens of the micro-batch with a context, pass by pass.
        passes (`list[dict[str, Any]]`):
            The rows of each pass.
    """

    loss: torch.Tensor
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
        teacher ([`Teacher`]):
            What gives the targets.
        objective ([`Objective`]):
            Which divergence, over which tokens.
        can_share_prompts (`bool`):
            Whether the teacher may read a prompt once for several rows.
        packs_rows (`bool`):
            Whether student and teacher both read rows without padding, which `pad_to_multiple_of` rules out. Then
            `max_tokens_per_microbatch` counts none.
        pad_to_multiple_of (`int`, *optional*):
            What the widths of prompts and completions are multiples of.
    """

    def __init__(
        self,
        args: SelfDistillationConfig,
        accelerator: Accelerator,
        teacher: Teacher,
        objective: Objective,
        can_share_prompts: bool,
        packs_rows: bool,
        pad_to_multiple_of: int | None,
    ):
        self.teacher = teacher
        self.can_share_prompts = can_share_prompts
        self._packs_rows = packs_rows and pad_to_multiple_of is None
        self._args = args
        self._accelerator = accelerator
        self._objective = objective
        self._pad_to_multiple_of = pad_to_multiple_of
        self._is_deepspeed = accelerator.state.deepspeed_plugin is not None
        # Where parameters are gathered, every process has to run as many forward passes
        self._is_sharded = getattr(accelerator.state, "fsdp_plugin", None) is not None or is_deepspeed_zero3_enabled()
        self._forward_redirection = _ForwardRedirection()
        self._has_checked_logits = False

    def __call__(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_micro_batches: int,
        num_generation_batches: int,
        policy: PolicyTerm | None = None,
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
            policy (`PolicyTerm`, *optional*):
                A loss that depends on the student through its log-probabilities alone, aggregated as `loss_type` says
                and divided by the number of micro-batches. It is added, from the same forward pass.
        """
        if not self._has_checked_logits:
            self.check_logits(model)
        tokens = inputs["loss_mask"]
        if policy is not None:
            tokens = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        # Weights are those of the whole micro-batch, so the gradients of its passes add up to its gradient. The last
        # pass is left to the caller, who runs the backward pass that synchronises.
        weights = self._weights(inputs, num_generation_batches)
        passes = self.passes({**inputs, "loss_weights": weights, "student_mask": tokens})
        outputs = []
        for index, rows in enumerate(passes):
            is_last = index == len(passes) - 1
            with nullcontext() if is_last else self._postponed_synchronisation(model):
                scale = num_micro_batches * share_of_rows(rows["student_mask"], tokens, self._args.loss_type)
                output = self._pass(model, rows, None if policy is None else _scaled(policy, scale))
                if torch.is_grad_enabled() and not is_last:
                    kwargs = {"scale_wrt_gas": False} if self._is_deepspeed else {}
                    self._accelerator.backward(output.loss / num_micro_batches, **kwargs)
                    output = output._replace(loss=output.loss.detach())
            outputs.append(output)
        loss = torch.stack([output.loss for output in outputs]).sum() / num_micro_batches
        statistics = FusedDivergence(loss.detach(), *map(torch.cat, list(zip(*outputs, strict=True))[1:]))
        return MicroBatchLoss(loss, statistics, passes)

    @torch.no_grad()
    def check_logits(self, model: nn.Module) -> None:
        """
        Refuse a student or a teacher that is not read as it reads by itself. This is done once, before the
        first pass at the latest: earlier where the model is on its device and whole.

        Args:
            model (`nn.Module`):
                Policy, wrapped as it is trained, if it will be.

        Raises:
            ValueError: See [`~trl_opsd.scoring.check_logits`] and [`~trl_opsd.scoring.check_packing`].
        """
        with self.teacher.weights(model) as teacher:
            if teacher is not None:
                self._check_logits(teacher)
        self._check_logits(model)
        self._has_checked_logits = True

    def _check_logits(self, model: nn.Module) -> None:
        unwrapped = self._accelerator.unwrap_model(model)

        def within(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
            return self._forward_redirection(model, unwrapped, forward)

        with self._accelerator.autocast():
            check_logits(unwrapped, self._accelerator.device, within)
            if self._packs(unwrapped):
                check_packing(unwrapped, self._accelerator.device, within)

    def log_probs(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_completion_tokens: int,
        batch_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Log-probabilities and entropies, computed as the policy term's are, without a gradient.

        Args:
            model (`nn.Module`):
                Any model, possibly wrapped.
            input_ids (`torch.Tensor` of shape `(B, P + T)`):
                Left-padded prompts and right-padded completions.
            attention_mask (`torch.Tensor` of shape `(B, P + T)`):
                1 for tokens, 0 for padding.
            num_completion_tokens (`int`):
                T.
            batch_size (`int`):
                Rows that go through the network at once.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: both of shape `(B, T)`, 0 for padding.
        """
        unwrapped = self._accelerator.unwrap_model(model)
        parts = [
            self._forward_redirection(
                model, unwrapped, self._rows_log_probs, unwrapped, ids, mask, mask[:, -num_completion_tokens:].bool()
            )
            for ids, mask in zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True)
        ]
        log_probs, entropies = map(torch.cat, zip(*parts, strict=True))
        return log_probs, entropies

    def _weights(self, inputs: dict[str, Any], num_generation_batches: int) -> torch.Tensor:
        num_shares = self._accelerator.num_processes * num_generation_batches
        num_tokens = inputs["num_loss_tokens"].clamp(min=1.0) / num_shares
        longest = cast(int, self._args.max_completion_length)  # `None` is refused where it matters
        weights = aggregation_weights(inputs["loss_mask"], self._args.loss_type, num_tokens, longest)
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
        kept = _rows_of(inputs, inputs["student_mask"].any(dim=1).nonzero().flatten().tolist())
        num_rows = len(kept["student_mask"])
        passes = [list(range(num_rows))] if num_rows else []
        number = 1
        if max_tokens is not None:
            prompts = torch.maximum(kept["prompt_mask"].sum(1), kept["teacher_prompt_mask"].sum(1)).tolist()
            completions = kept["completion_mask"].sum(1).tolist()
            if not self._packs_rows:
                prompts, completions = (
                    [padded_length(length, self._pad_to_multiple_of) for length in lengths]
                    for lengths in (prompts, completions)
                )
            groups = kept["teacher_prompt_groups"].tolist()
            passes = cut_by_tokens(prompts, completions, groups, max_tokens, padded=not self._packs_rows)
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

    def _pass(self, model: nn.Module, rows: dict[str, Any], policy: PolicyTerm | None) -> FusedDivergence:
        teacher_states, teacher_head = self.teacher.targets(
            model, rows, rows["loss_mask"].bool(), partial(self._read, rows)
        )
        student = self._accelerator.unwrap_model(model)
        # The whole computation runs inside the wrapped model's forward, so that DDP, FSDP2 and ZeRO-3 see it
        return self._forward_redirection(
            model, student, self._student_loss, student, rows, teacher_states, teacher_head, policy
        )

    def _read(self, rows: dict[str, Any], module: nn.Module) -> tuple[torch.Tensor, Head]:
        """The hidden states of a teacher's module that predict the tokens with a context, and its head."""
        with_context = rows["loss_mask"].any(dim=1)
        with_context[0] |= ~with_context.any()  # passes of all processes meet in collective operations
        rows = _rows_of(rows, with_context.nonzero().flatten().tolist())
        return self.teacher_states(
            module, *self._sequences(rows, "teacher_prompt", rows["loss_mask"]), rows["teacher_prompt_groups"]
        )

    def _sequences(
        self, rows: dict[str, Any], prompt: str, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids and attention mask of prompts and completions, and the selected tokens, without idle columns."""
        prompt_width = used_width(rows[f"{prompt}_mask"], "left", self._pad_to_multiple_of)
        width = used_width(rows["completion_mask"], "right", self._pad_to_multiple_of)
        ids, mask = (
            torch.cat([rows[f"{prompt}_{name}"][:, -prompt_width:], rows[f"completion_{name}"][:, :width]], dim=1)
            for name in ("ids", "mask")
        )
        return ids, mask, tokens[:, :width].bool()

    @torch.no_grad()
    def teacher_states(
        self,
        module: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        selected: torch.Tensor,
        groups: torch.Tensor,
    ) -> tuple[torch.Tensor, Head]:
        """
        The teacher's hidden states that predict the selected completion tokens, and its head.

        Args:
            module (`nn.Module`):
                The teacher's weights, possibly wrapped.
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
        teacher = self._accelerator.unwrap_model(module)
        shares_prompts = self._should_share_prompts(teacher, attention_mask, selected.size(1), groups)
        with evaluation_mode(teacher):
            hidden = self._forward_redirection(
                module,
                teacher,
                self._states,
                teacher,
                input_ids,
                attention_mask,
                selected,
                groups if shares_prompts else None,
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
            return completion_states(model, input_ids, attention_mask, selected, shared_groups, self._packs(model))

    def _packs(self, model: nn.Module) -> bool:
        return self._pad_to_multiple_of is None and can_pack(causal_lm(model))

    def _should_share_prompts(
        self, teacher: nn.Module, attention_mask: torch.Tensor, completion_width: int, groups: torch.Tensor
    ) -> bool:
        if not self.can_share_prompts:
            return False
        num_tokens = int(attention_mask.sum()) if self._packs(teacher) else attention_mask.numel()
        prompt_width = attention_mask.size(1) - completion_width
        num_shared = len(groups.unique()) * prompt_width + len(groups) * completion_width
        counts = torch.tensor([[num_tokens, num_shared]], device=self._accelerator.device)
        if self._is_sharded:
            counts = self._accelerator.gather(counts)  # all wait for the slowest
        num_tokens, num_shared = counts.amax(dim=0).tolist()
        on_gpu = self._accelerator.device.type == "cuda"
        return pays_off(num_tokens, num_shared, causal_lm(teacher).config.get_text_config() if on_gpu else None)

    def _student_loss(
        self,
        student: nn.Module,
        rows: dict[str, Any],
        teacher_states: torch.Tensor | TopLogProbs,
        teacher_head: Head | None,
        policy: PolicyTerm | None,
    ) -> FusedDivergence:
        hidden = self._states(student, *self._sequences(rows, "prompt", rows["student_mask"]))
        selected = rows["student_mask"].bool()
        token_ids, weights = rows["completion_ids"][selected], rows["loss_weights"][selected]
        student_head = head_of(student)
        heads = [student_head.weight, student_head.bias]
        if teacher_head is not None:
            heads += [teacher_head.weight, teacher_head.bias]
        with maybe_gather_lm_head_ctx(*heads), self._accelerator.autocast():
            student_head = unsharded(student_head)
            teacher_head = None if teacher_head is None else unsharded(teacher_head)
            hidden, teacher_states = (
                hidden.to(student_head.weight.device),
                teacher_states.to(student_head.weight.device),
            )
            fused = partial(
                fused_divergence,
                student_head=student_head,
                memory_budget=self._args.divergence_memory,
                kernel=self._args.divergence_kernel,
            )
            if policy is None:  # the selected tokens are those with a context
                return fused(
                    hidden,
                    teacher_states,
                    teacher_head=teacher_head,
                    token_ids=token_ids,
                    weights=weights,
                    objective=self._objective,
                )
            value, factors = policy(rows, partial(self._log_probs_of, hidden, student_head, token_ids, selected))
            factors = factors[selected]
            with_context = rows["loss_mask"].bool()[selected]
            output = fused(
                hidden[with_context],
                teacher_states,
                teacher_head=teacher_head,
                token_ids=token_ids[with_context],
                weights=weights[with_context],
                objective=self._objective,
                likelihood_weights=factors[with_context],
            )
            loss = value + _without_likelihood(output, factors[with_context])
            others = ~with_context
            if others.any():  # nothing but their likelihood counts, so the student may be its own teacher
                rest = fused(
                    hidden[others],
                    hidden[others].detach(),
                    teacher_head=student_head,
                    token_ids=token_ids[others],
                    weights=weights[others],
                    objective=Objective(temperature=self._objective.temperature),
                    likelihood_weights=factors[others],
                )
                loss = loss + _without_likelihood(rest, factors[others])
            return output._replace(loss=loss)

    def _rows_log_probs(
        self, model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, selected: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self._states(model, input_ids, attention_mask, selected)
        head = head_of(model)
        with maybe_gather_lm_head_ctx(head.weight, head.bias), self._accelerator.autocast():
            token_ids = input_ids[:, -selected.size(1) :][selected]
            return self._log_probs_of(hidden, unsharded(head), token_ids, selected)

    def _log_probs_of(
        self, hidden: torch.Tensor, head: Head, token_ids: torch.Tensor, selected: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = head.weight.device
        values = token_log_probs(
            hidden.detach().to(device),
            head,
            token_ids.to(device),
            self._objective.temperature,
            memory_budget=self._args.divergence_memory,
            kernel=self._args.divergence_kernel,
        )
        log_probs, entropies = (
            torch.zeros(selected.shape, dtype=value.dtype, device=device).masked_scatter(selected, value)
            for value in values
        )
        return log_probs, entropies


def _scaled(policy: PolicyTerm, factor: torch.Tensor) -> PolicyTerm:
    def scaled(rows, log_probs):
        value, factors = policy(rows, log_probs)
        return value * factor, factors * factor

    return scaled


def _without_likelihood(output: FusedDivergence, factors: torch.Tensor) -> torch.Tensor:
    """The loss without the value of its likelihood term, which is there for its gradient."""
    return output.loss + (factors * output.student_log_prob).where(output.finite.bool(), 0.0).sum()


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
    nothing = torch.zeros_like(row["loss_mask"])
    return {**row, "loss_mask": nothing, "student_mask": nothing, "tool_mask": nothing}
