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
    was_training = model.training
    model.eval()
    sampling: dict[str, Any] = {"do_sample": False}
    if sampling_seed is not None:
        sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
    responses, lengths, truncated = [], [], 0
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer.apply_chat_template(
            list(prompts[start : start + batch_size]),
            add_generation_prompt=True,
            padding=True,
            padding_side="left",
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode(), torch.random.fork_rng(enabled=sampling_seed is not None):
            if sampling_seed is not None:
                torch.manual_seed(sampling_seed + start)
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
        for tokens in output[:, inputs["input_ids"].shape[1] :].tolist():
            ended = tokenizer.eos_token_id in tokens
            length = tokens.index(tokenizer.eos_token_id) + 1 if ended else len(tokens)
            responses.append(tokenizer.decode(tokens[:length], skip_special_tokens=True))
            lengths.append(length)
            truncated += not ended
    model.train(was_training)
    graded = [correct(response, answer) for response, answer in zip(responses, answers, strict=True)]
    return Evaluation(
        accuracy=sum(graded) / len(graded),
        mean_tokens=sum(lengths) / len(lengths),
        truncated=truncated / len(lengths),
        responses=responses,
        correct=graded,
        lengths=lengths,
    )
