"""What a model says when it is asked about the made-up world, and which of it is right."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..context import PrivilegedContext
from .facts import is_right


MAX_TOKENS = 24


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    context: PrivilegedContext | None = None,
    batch_size: int = 32,
    max_tokens: int = MAX_TOKENS,
    is_right: Callable[[str, Mapping[str, Any]], bool] = is_right,
) -> list[dict[str, Any]]:
    """
    Asks a model questions, and grades its likeliest answers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that is asked.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a chat template.
        rows (`Sequence[Mapping[str, Any]]`):
            Questions, as [`~trl_opsd.playground.facts.World.rows`] makes them.
        context ([`PrivilegedContext`], *optional*):
            What the model reads besides. Nothing by default.
        batch_size (`int`, *optional*, defaults to `32`):
            Questions at a time.
        max_tokens (`int`, *optional*, defaults to `24`):
            Longest answer.
        is_right (`Callable[[str, Mapping], bool]`, *optional*):
            Whether an answer to a row is right. By default [`~trl_opsd.playground.facts.is_right`].

    Returns:
        `list[dict]`:
            Of each row: the `question`, the right `answer`, what was `said`, its `token_ids`, whether it is `right`,
            and whether it was `cut` at the limit.
    """
    prompts: list[Any] = [row["prompt"] if context is None else context.teacher_messages(row, None) for row in rows]
    written = respond(model, tokenizer, prompts, max_tokens, batch_size)
    said = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]
    return [
        {
            "question": row["prompt"][-1]["content"],
            "answer": row["answer"],
            "said": text,
            "token_ids": ids,
            "right": is_right(text, row),
            "cut": ids[-1] != tokenizer.eos_token_id,
        }
        for row, ids, text in zip(rows, written, said, strict=True)
    ]


def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, Any]]],
    max_tokens: int,
    batch_size: int,
) -> list[list[int]]:
    """
    The likeliest response to each prompt, a thinking model's without a thought.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that responds.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`Sequence[list[dict[str, Any]]]`):
            Messages of each.
        max_tokens (`int`):
            Longest response.
        batch_size (`int`):
            Prompts at a time, of like length.

    Returns:
        `list[list[int]]`: token ids, the one that ends a response included.
    """
    ids = tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, return_dict=True, enable_thinking=False
    )["input_ids"]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    found: list[list[int]] = [[] for _ in ids]
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = tokenizer.pad(
            {"input_ids": [ids[index] for index in chosen]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(
                **inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        for index, tokens in zip(chosen, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            ended = tokenizer.eos_token_id in tokens
            found[index] = tokens[: tokens.index(tokenizer.eos_token_id) + 1] if ended else tokens
    model.train(was_training)
    return found


def recall(answers: Sequence[Mapping[str, Any]]) -> float:
    """Share of right answers."""
    return fmean(answer["right"] for answer in answers)
