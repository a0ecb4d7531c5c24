"""What student and teacher say of the tokens of some rows: the passes through both networks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import maybe_gather_lm_head_ctx, pad

from ..objective import Combine, Head, Readings, teacher_choices, token_log_probs, tokens_in_top_k
from ..teacher import Teacher, TokenTargets
from .heads import causal_lm, head_of, unsharded
from .images import Images
from .logits import check_logits, check_packing
from .packed import can_pack
from .passes import cut_by_tokens, cut_into, idle_row, padded_length, rows_of, used_width
from .shared_prefix import pays_off
from .states import completion_states, evaluation_mode


# What rows may have been completed after, in the order of `Readings`
PROMPTS = ("teacher_prompt", "prompt", "contrast_prompt")


class Networks:
    """
    The passes of student and teacher. All of it runs inside the wrapped model's forward, so that DDP, FSDP2 and ZeRO-3
    see it, and all processes call it alike.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Of the run.
        teacher ([`Teacher`]):
            What gives the targets.
        can_share_prompts (`bool`):
            Whether the teacher may read a prompt once for several rows.
        packs_rows (`bool`):
            Whether student and teacher both read rows without padding, which `pad_to_multiple_of` rules out. Then
            `max_tokens` counts none.
        pad_to_multiple_of (`int`, *optional*):
            What the widths of prompts and completions are multiples of.
        max_tokens (`int`, *optional*):
            Most tokens that go through a network at once.
        temperature (`float`):
            Logits are divided by it.
        memory_budget (`float`, *optional*):
            See [`~trl_opsd.objective.fused_divergence`].
        kernel (`str`, *optional*):
            See there.
        num_tokens (`int`, *optional*):
            Tokens of the vocabulary that are looked at, the first ones, if not all.
        combine (`Callable`, *optional*):
            What is made of three readings of the teacher. `None` has it read one prompt.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        teacher: Teacher,
        can_share_prompts: bool,
        packs_rows: bool,
        pad_to_multiple_of: int | None,
        max_tokens: int | None,
        temperature: float,
        memory_budget: float | None,
        kernel: str | None,
        num_tokens: int | None = None,
        combine: Combine | None = None,
    ):
        self.teacher = teacher
        self.can_share_prompts = can_share_prompts
        self._packs_rows = packs_rows and pad_to_multiple_of is None
        self._accelerator = accelerator
        self._pad_to_multiple_of = pad_to_multiple_of
        self.max_tokens = max_tokens
        self._temperature = temperature
        self._memory_budget = memory_budget
        self._kernel = kernel
        self._num_tokens = num_tokens
        self._combine = combine
        # Where parameters are gathered, every process has to run as many forward passes
        self._is_sharded = getattr(accelerator.state, "fsdp_plugin", None) is not None or is_deepspeed_zero3_enabled()
        self._forward_redirection = _ForwardRedirection()
        self.has_checked_logits = False

    def whole(self, head: Head) -> Head:
        """A head of which every tensor is here, over the tokens that are looked at."""
        return unsharded(head, self._num_tokens)

    def within(self, model: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of the unwrapped model and `args` inside the wrapped one's forward."""
        unwrapped = self._accelerator.unwrap_model(model)
        return self._forward_redirection(model, unwrapped, function, unwrapped, *args)

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
        for one in self.teacher.members.values() or [self.teacher]:
            with one.weights(model) as teacher:
                if teacher is not None:
                    self._check_logits(teacher)
        self._check_logits(model)
        self.has_checked_logits = True

    def _check_logits(self, model: nn.Module) -> None:
        unwrapped = self._accelerator.unwrap_model(model)

        def within(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
            return self.within(model, lambda _: forward())

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
        batch_size: int | None,
        images: Sequence[Images] | None = None,
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
            batch_size (`int`, *optional*):
                Rows that go through the network at once. `None` for all.
        images (`Sequence[Images]`, *optional*):
            Images of each row, see [`image_inputs`].

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: both of shape `(B, T)`, 0 for padding.
        """
        batch_size = batch_size or len(input_ids)
        parts = []
        for start in range(0, len(input_ids), batch_size):
            some = slice(start, start + batch_size)
            mask, its = attention_mask[some], None if images is None else images[some]
            given = input_ids[some], mask, mask[:, -num_completion_tokens:].bool(), its
            parts.append(self.within(model, self._rows_log_probs, *given))
        log_probs, entropies = map(torch.cat, zip(*parts, strict=True))
        return log_probs, entropies

    @torch.no_grad()
    def share_in_top_k(
        self,
        model: nn.Module,
        batch_size: int,
        prompt_ids: Sequence[list[int]],
        completion_ids: Sequence[list[int]],
        k: int,
    ) -> list[float]:
        """
        The share of a completion's tokens that are among the k most probable ones where they stand. All processes call
        this with as many.

        Args:
            model (`nn.Module`):
                Any model, possibly wrapped.
            batch_size (`int`):
                Rows that go through the network at once.
            prompt_ids (`Sequence[list[int]]`):
                Prompts.
            completion_ids (`Sequence[list[int]]`):
                Completions.
            k (`int`):
                Number of tokens.

        Returns:
            `list[float]`: for each completion, 0 for an empty one.
        """
        shares: list[float] = []
        device = self._accelerator.device
        for start in range(0, len(prompt_ids), batch_size):
            ids, masks = [], []
            for some, side in ((prompt_ids, "left"), (completion_ids, "right")):
                rows = [torch.tensor(one, dtype=torch.int64) for one in some[start : start + batch_size]]
                ids.append(pad(rows, 0, side).to(device))
                masks.append(pad([torch.ones_like(one) for one in rows], 0, side).to(device))
            with evaluation_mode(self._accelerator.unwrap_model(model)):
                given = torch.cat(ids, dim=1), torch.cat(masks, dim=1), masks[1].bool()
                found = self.within(model, self._rows_in_top_k, *given, k)
            shares += (found.sum(dim=1) / masks[1].sum(dim=1).clamp(min=1)).tolist()
        return shares

    def _rows_in_top_k(
        self, model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, selected: torch.Tensor, k: int
    ) -> torch.Tensor:
        hidden = self.states(model, input_ids, attention_mask, selected)
        head = head_of(model)
        with maybe_gather_lm_head_ctx(head.weight, head.bias), self._accelerator.autocast():
            head = self.whole(head)
            token_ids = input_ids[:, input_ids.size(1) - selected.size(1) :][selected].to(head.weight.device)
            found = tokens_in_top_k(hidden.to(head.weight.device), head, token_ids, k, self._memory_budget)
            return torch.zeros_like(selected).masked_scatter(selected, found.to(selected.device))

    def passes(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """
        The rows of a micro-batch with a token in the loss, cut into what goes through the network at once.

        Args:
            inputs (`dict[str, Any]`):
                Micro-batch. Its `student_mask` of shape `(B, T)` says which tokens are in the loss.

        Returns:
            `list[dict[str, Any]]`: as many on every process.
        """
        kept = rows_of(inputs, inputs["student_mask"].any(dim=1).nonzero().flatten().tolist())
        num_rows = len(kept["student_mask"])
        passes = [list(range(num_rows))] if num_rows else []
        number = 1
        if self.max_tokens is not None:
            masks = [kept[f"{prompt}_mask"].sum(1) for prompt in PROMPTS if f"{prompt}_mask" in kept]
            prompts = torch.stack(masks).amax(dim=0).tolist()
            completions = kept["completion_mask"].sum(1).tolist()
            if not self._packs_rows:
                prompts, completions = (
                    [padded_length(length, self._pad_to_multiple_of) for length in lengths]
                    for lengths in (prompts, completions)
                )
            groups = kept["teacher_prompt_groups"].tolist()
            passes = cut_by_tokens(prompts, completions, groups, self.max_tokens, padded=not self._packs_rows)
            number = max(number, len(passes))
            if self._accelerator.num_processes > 1:
                numbers = torch.tensor(number, device=self._accelerator.device)
                number = int(self._accelerator.gather(numbers).max())
                passes = cut_into(passes, number)
        # Forward and backward passes meet in collective operations: a process without as many runs idle ones
        idle = [idle_row(inputs)] * (number - len(passes))
        return [rows_of(kept, rows) for rows in passes] + idle

    def targets(self, model: nn.Module, rows: dict[str, Any]) -> list[TokenTargets]:
        """
        What the teacher says of some tokens.

        Args:
            model (`nn.Module`):
                Policy, wrapped as it is trained.
            rows (`dict[str, Any]`):
                Some rows. Their `divergence_mask` of shape `(b, T)` says which tokens.

        Returns:
            `list[TokenTargets]`: of each of those tokens states, or [`Readings`], and the head that reads them, or
            what a server has reported.
        """
        read = self._read if self._combine is None else partial(self._read_all, self._combine)
        return self.teacher.targets(model, rows, rows["divergence_mask"].bool(), read)

    def _read_all(self, combine: Combine, module: nn.Module, rows: dict[str, Any]) -> tuple[Readings, Head]:
        states, heads = zip(*(self._read(module, rows, prompt) for prompt in PROMPTS), strict=True)
        return Readings(states, combine), heads[0]

    def _read(
        self, module: nn.Module, rows: dict[str, Any], prompt: str = "teacher_prompt"
    ) -> tuple[torch.Tensor, Head]:
        with_context = rows["divergence_mask"].any(dim=1)
        is_idle = not with_context.any()
        with_context[0] |= is_idle  # passes of all processes meet in collective operations
        rows = rows_of(rows, with_context.nonzero().flatten().tolist())
        ids, mask, selected, images = self.sequences(rows, prompt, rows["divergence_mask"])
        if is_idle and not any(images or ()):  # whose tokens belong together
            first = ids.size(1) - selected.size(1)
            ids, mask, selected = ids[:, first - 1 : first + 1], mask[:, first - 1 : first + 1], selected[:, :1]
        return self.teacher_states(module, ids, mask, selected, rows[f"{prompt}_groups"], images)

    @torch.no_grad()
    def contrasts(
        self, model: nn.Module, inputs: dict[str, Any], prompts: Sequence[Sequence[list[int]]], batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What the teacher says of tokens after several other prompts, none to many for each row, without a gradient. All
        processes call this, and take as many passes.

        Args:
            model (`nn.Module`):
                Policy, wrapped as it is trained.
            inputs (`dict[str, Any]`):
                Rows, whose `divergence_mask` of shape `(B, T)` says which tokens.
            prompts (`Sequence[Sequence[list[int]]]`):
                Token ids of the prompts of each row.
            batch_size (`int`):
                Readings of a micro-batch.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the number of readings of each row, of shape `(B, 1)`, and the
            logarithm of the mean of the sampled token's probability over them, of shape `(B, T)`, fp32.
        """
        tokens = inputs["divergence_mask"].bool()
        total = torch.full(tokens.shape, -torch.inf, device=tokens.device)
        pairs = sorted((ids, row) for row, some in enumerate(prompts) for ids in some)  # equal prompts may be shared
        number = torch.tensor(len(pairs), device=tokens.device)
        most = int(self._accelerator.gather(number).max())
        for start in range(0, most, batch_size):
            some = pairs[start : start + batch_size]
            for rows in self.passes(self._readings(inputs, some)):
                selected = rows["divergence_mask"].bool()
                targets = self.teacher.targets(model, rows, selected, self._read)
                log_probs = self.within(model, self._head_log_probs, targets, rows, selected)
                for row, mask, values in zip(rows["row"].tolist(), selected, log_probs.to(total), strict=True):
                    total[row] = torch.logaddexp(total[row], values.where(mask, -torch.inf))
        counts = torch.tensor([[len(some)] for some in prompts], device=tokens.device)
        return counts, total - counts.log()

    def _readings(self, inputs: dict[str, Any], pairs: list[tuple[list[int], int]]) -> dict[str, Any]:
        """Rows once more, each after a prompt. Without any there is one of which no token is read."""
        ids = [torch.tensor(prompt) for prompt, _ in pairs] or [inputs["teacher_prompt_ids"][0].cpu()]
        numbers = {tuple(prompt): number for number, (prompt, _) in enumerate(pairs)}
        device, multiple = inputs["divergence_mask"].device, self._pad_to_multiple_of
        readings = rows_of(inputs, [row for _, row in pairs] or [0])
        readings |= {
            "row": torch.tensor([row for _, row in pairs] or [0], device=device),
            "teacher_prompt_ids": pad(ids, 0, "left", multiple).to(device),
            "teacher_prompt_mask": pad([torch.ones_like(its) for its in ids], 0, "left", multiple).to(device),
            "teacher_prompt_groups": torch.tensor([numbers[tuple(prompt)] for prompt, _ in pairs] or [0]),
        }
        mask = readings["divergence_mask"] if pairs else torch.zeros_like(readings["divergence_mask"])
        return {**readings, "divergence_mask": mask, "student_mask": mask}

    def _head_log_probs(
        self, _: nn.Module, targets: list[TokenTargets], rows: dict[str, Any], selected: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros(selected.shape, device=selected.device)
        for states, head, tokens in targets:
            assert isinstance(states, torch.Tensor)  # no server's
            assert head is not None
            place = selected if tokens is None else selected.masked_scatter(selected, tokens)
            with maybe_gather_lm_head_ctx(head.weight, head.bias), self._accelerator.autocast():
                given = states, self.whole(head), rows["completion_ids"][place], place
                total = total + self.log_probs_of(*given)[0].to(total)
        return total

    def sequences(
        self, rows: dict[str, Any], prompt: str, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Images] | None]:
        """
        Token ids and attention mask of prompts and completions, and the selected tokens, without idle columns; and the
        images of each row.
        """
        prompt_width = used_width(rows[f"{prompt}_mask"], "left", self._pad_to_multiple_of)
        width = used_width(rows["completion_mask"], "right", self._pad_to_multiple_of)
        ids, mask = (
            torch.cat([rows[f"{prompt}_{name}"][:, -prompt_width:], rows[f"completion_{name}"][:, :width]], dim=1)
            for name in ("ids", "mask")
        )
        return ids, mask, tokens[:, :width].bool(), rows.get("images" if prompt == "prompt" else "teacher_images")

    @torch.no_grad()
    def teacher_states(
        self,
        module: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        selected: torch.Tensor,
        groups: torch.Tensor,
        images: Sequence[Images] | None = None,
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
            images (`Sequence[Images]`, *optional*):
                Images of each row, see [`image_inputs`].

        Returns:
            `tuple[torch.Tensor, Head]`: states of shape `(number of selected tokens, H)`, without a gradient.
        """
        teacher = self._accelerator.unwrap_model(module)
        shares_prompts = self._should_share_prompts(teacher, attention_mask, selected.size(1), groups)
        with evaluation_mode(teacher):
            shared_groups = groups if shares_prompts else None
            given = input_ids, attention_mask, selected, images, shared_groups
            hidden = self.within(module, self.states, *given)
        return hidden, head_of(teacher)

    def states(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        selected: torch.Tensor,
        images: Sequence[Images] | None = None,
        shared_groups: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See [`completion_states`]. To be called inside the wrapped model's forward."""
        with self._accelerator.autocast():  # inside the wrapped model's forward, which may have an opinion of its own
            packs = self._packs(model)
            return completion_states(model, input_ids, attention_mask, selected, shared_groups, packs, images)

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

    def _rows_log_probs(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        selected: torch.Tensor,
        images: Sequence[Images] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.states(model, input_ids, attention_mask, selected, images)
        head = head_of(model)
        with maybe_gather_lm_head_ctx(head.weight, head.bias), self._accelerator.autocast():
            token_ids = input_ids[:, -selected.size(1) :][selected]
            return self.log_probs_of(hidden, self.whole(head), token_ids, selected)

    def log_probs_of(
        self, hidden: torch.Tensor, head: Head, token_ids: torch.Tensor, selected: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Log-probabilities and entropies from hidden states.

        Args:
            hidden (`torch.Tensor` of shape `(N, H)`):
                States of the selected tokens.
            head ([`Head`]):
                Head, whole.
            token_ids (`torch.Tensor` of shape `(N,)`):
                The selected tokens.
            selected (`torch.Tensor` of shape `(b, T)`, bool):
                Where they stand.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: both of shape `(b, T)`, 0 elsewhere, without a gradient.
        """
        device = head.weight.device
        values = token_log_probs(
            hidden.detach().to(device),
            head,
            token_ids.to(device),
            self._temperature,
            memory_budget=self._memory_budget,
            kernel=self._kernel,
        )
        return _placed(values, selected)

    def choices_of(
        self,
        hidden: torch.Tensor,
        head: Head,
        teacher_hidden: torch.Tensor,
        teacher_head: Head,
        tokens: torch.Tensor,
        top_k: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What [`~trl_opsd.objective.teacher_choices`] says of some tokens.

        Args:
            hidden (`torch.Tensor` of shape `(N, H)`):
                The student's states of the tokens.
            head ([`Head`]):
                The student's, whole.
            teacher_hidden (`torch.Tensor` of shape `(N, H_t)`):
                The teacher's states of them.
            teacher_head ([`Head`]):
                The teacher's, whole.
            tokens (`torch.Tensor` of shape `(b, T)`, bool):
                Where they stand.
            top_k (`int`):
                Number of the teacher's most probable tokens.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: both of shape `(b, T)`, 0 elsewhere, without a gradient.
        """
        values = teacher_choices(
            hidden.detach(),
            teacher_hidden,
            head,
            teacher_head,
            top_k,
            self._temperature,
            memory_budget=self._memory_budget,
            kernel=self._kernel,
        )
        return _placed(values, tokens)


def _placed(values: tuple[torch.Tensor, torch.Tensor], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    one, other = (
        torch.zeros(tokens.shape, dtype=value.dtype, device=value.device).masked_scatter(tokens, value)
        for value in values
    )
    return one, other
