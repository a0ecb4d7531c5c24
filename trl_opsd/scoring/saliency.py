"""Which tokens of a reasoning an answer depends on: a mask over its attention, optimised for the answer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .heads import causal_lm
from .states import evaluation_mode


@dataclass(frozen=True)
class AttentionSaliency:
    """
    Optimises what is added to the attention scores, in all layers and heads alike, where tokens attend to earlier
    tokens of the reasoning, such that the answer becomes likely, as in
    [AtManRL](https://huggingface.co/papers/2604.16158). All of it is suppressed at first, and opened where that helps.

    Args:
        num_steps (`int`, *optional*, defaults to `200`):
            Steps of AdamW, a forward and a backward pass each.
        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Its learning rate. A step moves an entry by about as much.
        start (`float`, *optional*, defaults to `-0.4`):
            Where all entries start. They end between it, or somewhat below, and 0.
        scale (`float`, *optional*, defaults to `10.0`):
            What they are multiplied by before they are added.
        batch_size (`int`, *optional*, defaults to `1`):
            Rows that go through the network at once.

    Raises:
        ValueError: If a number is out of range.
    """

    num_steps: int = 200
    learning_rate: float = 1e-3
    start: float = -0.4
    scale: float = 10.0
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.num_steps < 0 or self.batch_size < 1:
            raise ValueError(
                f"`num_steps` must not be negative and `batch_size` at least 1, got {self.num_steps} and "
                f"{self.batch_size}."
            )
        if not self.start < 0 or not self.scale > 0 or not self.learning_rate > 0:
            raise ValueError(
                f"`start` must be negative, `scale` and `learning_rate` positive, got {self.start}, {self.scale} and "
                f"{self.learning_rate}."
            )

    def __call__(
        self, model: nn.Module, rows: Sequence[tuple[list[int], list[int], list[int]]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        The masks of some rows, each optimised by itself. The model's weights, their gradients and its attention are
        left as they were.

        Args:
            model (`nn.Module`):
                Causal language model, not wrapped.
            rows (`Sequence[tuple[list[int], list[int], list[int]]]`):
                Token ids of prompt, reasoning and answer, at least one each.

        Returns:
            `list[tuple[torch.Tensor, torch.Tensor]]`: of each row, the mask divided by `start`, of shape `(tokens of
            reasoning and answer − 1, tokens of the reasoning)`: 1 where attention is still suppressed, 0 where it is
            open; and which of its entries there are, bool.

        Raises:
            ValueError: If the model's weights are spread over processes, or if it has no eager attention.
        """
        if any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise ValueError(
                "The saliency of a reasoning is found on each process by itself, and the model's weights are spread "
                "over all of them. Train without ZeRO-3 and FSDP: with DDP, ZeRO-1 or ZeRO-2."
            )
        found = []
        with evaluation_mode(model), eager_attention(causal_lm(model)):
            for first in range(0, len(rows), self.batch_size):
                found += self._of_batch(model, rows[first : first + self.batch_size])
        return found

    def _of_batch(
        self, model: nn.Module, rows: Sequence[tuple[list[int], list[int], list[int]]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        weight = next(model.parameters())
        device, width = weight.device, max(sum(map(len, row)) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64, device=device)
        is_answer = torch.zeros(len(rows), width, dtype=torch.bool, device=device)
        is_open_to_change = torch.zeros(len(rows), width, width, dtype=torch.bool, device=device)
        earlier = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        for index, (prompt, reasoning, answer) in enumerate(rows):
            begin, end, last = len(prompt), len(prompt) + len(reasoning), sum(map(len, rows[index]))
            ids[index, :last] = torch.tensor(prompt + reasoning + answer)
            is_answer[index, end:last] = True
            # The last token of the answer predicts none of it
            is_open_to_change[index, begin : last - 1, begin:end] = earlier[begin : last - 1, begin:end].tril(-1)
        values = torch.full((len(rows), width, width), self.start, device=device)
        values = self._optimised(model, values, ids, is_answer, is_open_to_change, earlier)
        return [
            (
                (values[index] / self.start)[len(prompt) : len(prompt) + len(reasoning + answer) - 1, columns],
                is_open_to_change[index, len(prompt) : len(prompt) + len(reasoning + answer) - 1, columns],
            )
            for index, (prompt, reasoning, answer) in enumerate(rows)
            for columns in [slice(len(prompt), len(prompt) + len(reasoning))]
        ]

    def _optimised(
        self,
        model: nn.Module,
        values: torch.Tensor,
        ids: torch.Tensor,
        is_answer: torch.Tensor,
        is_open_to_change: torch.Tensor,
        earlier: torch.Tensor,
    ) -> torch.Tensor:
        dtype = next(model.parameters()).dtype
        fixed = torch.zeros(earlier.shape, dtype=dtype, device=ids.device).masked_fill(
            ~earlier, torch.finfo(dtype).min
        )
        # Of all positions, those that predict a token of an answer
        kept = torch.arange(int(is_answer.any(dim=0).nonzero()[0]) - 1, ids.size(1) - 1, device=ids.device)
        targets, counted = ids[:, kept + 1], is_answer[:, kept + 1]
        shares = counted / counted.sum(dim=1, keepdim=True)
        positions = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
        with torch.enable_grad():
            values.requires_grad_()
            optimizer = torch.optim.AdamW([values], lr=self.learning_rate, betas=(0.6, 0.9999), weight_decay=0.05)
            for _ in range(self.num_steps):
                added = torch.where(is_open_to_change, self.scale * values, 0.0).to(dtype)
                kwargs: dict[str, Any] = {"attention_mask": (fixed + added).unsqueeze(1), "position_ids": positions}
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept, **kwargs).logits
                losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
                (values.grad,) = torch.autograd.grad((losses * shares).sum(), values)
                optimizer.step()
                with torch.no_grad():
                    values.clamp_(max=0.0)
        return values.detach()


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """
    Inside, attention scores are computed one by one, so that anything may be added to them.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.

    Raises:
        ValueError: If it cannot do so.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        if model.config._attn_implementation != "eager":
            raise ValueError(
                f"{type(model).__name__} cannot be told to compute its attention eagerly, which a mask that is "
                "optimised needs. Train another model, or leave this reward out."
            )
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
