"""Completions by `generate` of transformers: slower than vLLM, and runs anywhere."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .base import Completion, Request, Sampling
from .mixed import MixedCompletion, MixedRequest, sides_of


class SeededSampling(LogitsProcessor):
    """
    Draws each row's next token with random numbers of the row's own, and leaves that token alone to be chosen.

    One uniform number per row and position, put through the inverse of the row's cumulative distribution: exactly the
    distribution of the scores, and the same draw in any batch.

    Args:
        seeds (`Sequence[int]`):
            Seed of each row.
        prompt_length (`int`):
            Tokens of the padded prompts.
        max_new_tokens (`int`):
            Longest completion.
    """

    def __init__(self, seeds: Sequence[int], prompt_length: int, max_new_tokens: int):
        self._uniforms = np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds])
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniforms = torch.from_numpy(self._uniforms[:, input_ids.shape[1] - self._prompt_length]).to(scores.device)
        cumulative = scores.double().softmax(-1).cumsum(-1)
        # Not `>=`: a token of probability zero never raises the sum, so it is never the first above the number
        above = cumulative > uniforms[:, None] * cumulative[:, -1:]
        drawn = above.int().argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


class MixedSampling(LogitsProcessor):
    """
    Draws the next token of pairs of rows, of which one in each says how, and gives it to both.

    Args:
        sides (`torch.Tensor` of shape `(N, max_new_tokens)`, bool):
            For each pair and position, whether the row of the first half says how.
        prompt_length (`int`):
            Tokens of the padded prompts.
        draw ([`SeededSampling`], *optional*):
            Draws a token for each pair. `None` takes the likeliest.
    """

    def __init__(self, sides: torch.Tensor, prompt_length: int, draw: SeededSampling | None):
        self._sides, self._prompt_length, self._draw = sides, prompt_length, draw

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        first, second = scores.chunk(2)
        sides = self._sides[:, input_ids.shape[1] - self._prompt_length].to(scores.device)
        chosen = torch.where(sides[:, None], first, second)
        if self._draw is not None:
            chosen = self._draw(input_ids[: len(chosen)], chosen)
        return chosen.repeat(2, 1)


class TransformersBackend:
    """
    Generates batch by batch.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model, with its adapter if it has one.
        end_token_ids (`list[int]`):
            Tokens that end a completion.
        batch_size (`int`):
            Completions generated together.
    """

    def __init__(self, model: Any, end_token_ids: list[int], batch_size: int):
        # The layers of an adapter sit inside the base model, whose `generate` takes no detour
        self._model = model.get_base_model() if isinstance(model, PeftModel) else model
        self._end_token_ids = end_token_ids
        self._batch_size = batch_size
        self.max_length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        for start in range(0, len(requests), self._batch_size):
            batch = requests[start : start + self._batch_size]
            prompts = [request.prompt_ids for request in batch]
            width = max(map(len, prompts))
            drawn = SeededSampling([request.seed for request in batch], width, sampling.max_new_tokens)
            rows = self._completed(prompts, sampling, [drawn] if sampling.temperature > 0 else [])
            for index, tokens in enumerate(rows, start):
                yield index, Completion(*self._cut(tokens))

    def generate_mixed(
        self, requests: Sequence[MixedRequest], sampling: Sampling
    ) -> Iterator[tuple[int, MixedCompletion]]:
        for start in range(0, len(requests), self._batch_size):
            batch = requests[start : start + self._batch_size]
            prompts = [request.prompt_ids for request in batch] + [request.other_prompt_ids for request in batch]
            width, longest = max(map(len, prompts)), sampling.max_new_tokens
            sides = [sides_of(request, longest) for request in batch]
            drawn = SeededSampling([request.seed for request in batch], width, longest)
            mixed = MixedSampling(torch.tensor(sides), width, drawn if sampling.temperature > 0 else None)
            rows = self._completed(prompts, sampling, [mixed])
            for index, (tokens, its) in enumerate(zip(rows[: len(batch)], sides, strict=True), start):
                ids, is_terminated = self._cut(tokens)
                yield index, MixedCompletion(ids, is_terminated, its[: len(ids)])

    def _cut(self, tokens: list[int]) -> tuple[list[int], bool]:
        end = next((place for place, token in enumerate(tokens, 1) if token in self._end_token_ids), None)
        return tokens[:end], end is not None

    @torch.inference_mode()
    def _completed(
        self, prompts: Sequence[list[int]], sampling: Sampling, draw: Sequence[LogitsProcessor]
    ) -> list[list[int]]:
        """Completions of prompts that go through the model together, and what may stand after their ends."""
        pad = self._end_token_ids[0]
        width = max(map(len, prompts))
        rows = [[pad] * (width - len(ids)) + ids for ids in prompts]
        masks = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            if sampling.temperature != 1:
                processors.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k > 0:
                processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(sampling.top_p))
        processors.extend(draw)
        was_training, own_config = self._model.training, self._model.generation_config
        self._model.eval()
        # `generate` fills what a configuration leaves open from the model's own, say with a repetition penalty
        self._model.generation_config = GenerationConfig()
        try:
            output = self._model.generate(
                input_ids=torch.tensor(rows, device=self._model.device),
                attention_mask=torch.tensor(masks, device=self._model.device),
                logits_processor=processors,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=self._end_token_ids,
                    pad_token_id=pad,
                ),
            )
        finally:
            self._model.generation_config = own_config
            self._model.train(was_training)
        completions: list[list[int]] = output[:, width:].tolist()
        return completions
