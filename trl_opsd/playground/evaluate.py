"""Evaluation on held-out problems."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .world import correct


@dataclass(frozen=True)
class Evaluation:
    """
    What a model did on held-out problems.

    Args:
        accuracy (`float`):
            Share of right answers.
        mean_tokens (`float`):
            Mean number of response tokens, the end-of-turn token included.
        truncated (`float`):
            Share of responses that were cut at the token limit.
        responses (`list[str]`):
            Text of every response.
        correct (`list[bool]`):
            Whether each is right.
        lengths (`list[int]`):
            Tokens of each.
    """

    accuracy: float
    mean_tokens: float
    truncated: float
    responses: list[str]
    correct: list[bool]
    lengths: list[int]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, Any]]],
    answers: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 200,
    sampling_seed: int | None = None,
) -> Evaluation:
    """
    Answers prompts and grades the responses.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to evaluate.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a chat template.
        prompts (`Sequence[list[dict[str, Any]]]`):
            Messages of each prompt.
        answers (`Sequence[str]`):
            Right answer of each.
        max_new_tokens (`int`):
            Longest response.
        batch_size (`int`, *optional*, defaults to `200`):
            Prompts per batch.
        sampling_seed (`int`, *optional*):
            Seed of sampling at temperature 1 and top-p 0.95, which leaves the global random state as it was. By
            default, the most probable token is taken.

    Returns:
        [`Evaluation`]:
            Accuracy, length and responses.
    """
    responses, lengths, truncated = respond(model, tokenizer, prompts, max_new_tokens, batch_size, sampling_seed)
    graded = [correct(response, answer) for response, answer in zip(responses, answers, strict=True)]
    return Evaluation(
        accuracy=sum(graded) / len(graded),
        mean_tokens=sum(lengths) / len(lengths),
        truncated=sum(truncated) / len(lengths),
        responses=responses,
        correct=graded,
        lengths=lengths,
    )


def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, Any]]],
    max_new_tokens: int,
    batch_size: int = 200,
    sampling_seed: int | None = None,
) -> tuple[list[str], list[int], list[bool]]:
    """
    Answers prompts.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that answers.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a chat template.
        prompts (`Sequence[list[dict[str, Any]]]`):
            Messages of each prompt.
        max_new_tokens (`int`):
            Longest response.
        batch_size (`int`, *optional*, defaults to `200`):
            Prompts per batch.
        sampling_seed (`int`, *optional*):
            As of [`evaluate`].

    Returns:
        `tuple[list[str], list[int], list[bool]]`:
            Text of every response, its tokens with the one that ends it, and whether it was cut at the limit.
    """
    was_training = model.training
    model.eval()
    sampling: dict[str, Any] = {"do_sample": False}
    if sampling_seed is not None:
        sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
    responses, lengths, truncated = [], [], []
    for start in range(0, len(prompts), batch_size):
        ids = tokenizer.apply_chat_template(
            list(prompts[start : start + batch_size]), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        # The template's own padding is on the tokenizer's side, whatever it is asked for
        inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
        with torch.inference_mode(), torch.random.fork_rng(enabled=sampling_seed is not None):
            if sampling_seed is not None:
                torch.manual_seed(sampling_seed + start)
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
        for tokens in output[:, inputs["input_ids"].shape[1] :].tolist():
            ended = tokenizer.eos_token_id in tokens
            length = tokens.index(tokenizer.eos_token_id) + 1 if ended else len(tokens)
            responses.append(tokenizer.decode(tokens[:length], skip_special_tokens=True))
            lengths.append(length)
            truncated.append(not ended)
    model.train(was_training)
    return responses, lengths, truncated
