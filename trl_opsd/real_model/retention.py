"""What a model could do before: prompts that have nothing to do with what it is trained on."""

from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..eval.scorer import score, score_named
from ..playground.recall import respond


# Questions with answers that a small model may know, each with other words for them
QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("What is the capital of France?", ("Paris",)),
    ("What is the capital of Italy?", ("Rome",)),
    ("What is the capital of Japan?", ("Tokyo",)),
    ("What is the capital of Germany?", ("Berlin",)),
    ("What is the capital of Spain?", ("Madrid",)),
    ("What is the capital of Russia?", ("Moscow",)),
    ("On which continent is Egypt?", ("Africa",)),
    ("On which continent is China?", ("Asia",)),
    ("Which planet do we live on?", ("Earth",)),
    ("Which star is closest to the Earth?", ("the Sun", "Sun")),
    ("How many days does a week have?", ("seven", "7")),
    ("How many months does a year have?", ("twelve", "12")),
    ("How many legs does a spider have?", ("eight", "8")),
    ("How many minutes does an hour have?", ("sixty", "60")),
    ("Which month comes after March?", ("April",)),
    ("Which day comes after Monday?", ("Tuesday",)),
    ("What is the opposite of hot?", ("cold",)),
    ("What is the opposite of big?", ("small", "little")),
    ("What is the opposite of up?", ("down",)),
    ("What colour is grass?", ("green",)),
    ("What colour is snow?", ("white",)),
    ("What is frozen water called?", ("ice",)),
    ("Which animal barks?", ("dog", "dogs")),
    ("Which animal gives us milk?", ("cow", "cows", "goat", "goats")),
    ("What do bees make?", ("honey",)),
    ("Who wrote Romeo and Juliet?", ("Shakespeare",)),
    ("Who painted the Mona Lisa?", ("Leonardo", "da Vinci")),
    ("What gas do humans need to breathe?", ("oxygen",)),
    ("What is 2 plus 3?", ("five", "5")),
    ("What is 10 minus 4?", ("six", "6")),
    ("In which language is 'bonjour' a greeting?", ("French",)),
    ("What is the largest ocean?", ("Pacific",)),
)
INSTRUCTIONS = (
    "Write a sentence about the sea.",
    "Describe a cat.",
    "Explain why people sleep.",
    "Tell me something about trains.",
    "Give me a tip for saving money.",
    "Write a short greeting for a friend.",
    "What should I pack for a trip to the mountains?",
    "Why is the sky blue?",
    "Name three fruits.",
    "List three things that are round.",
    "Suggest a title for a story about a dragon.",
    "What makes a good teacher?",
    "How do I boil an egg?",
    "Summarize what a library is for.",
    "Translate 'good morning' into Spanish.",
    "Write a line of a poem about rain.",
)
# Families of reasoning-gym at levels of which a small model solves about half, and how many problems of each
FAMILIES: tuple[tuple[str, dict[str, int]], ...] = (
    ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    ("products", {"min_digits": 1, "max_digits": 1}),
)
PROBLEMS = 12
MAX_TOKENS = 40


def prompts() -> list[list[dict[str, str]]]:
    """All prompts, as messages: the questions, then the instructions."""
    texts = [*(question for question, _ in QUESTIONS), *INSTRUCTIONS]
    return [[{"role": "user", "content": text}] for text in texts]


@cache
def problems() -> list[tuple[str, str]]:
    """The problems of the [`FAMILIES`], each with its answer."""
    from reasoning_gym import create_dataset

    made = [row for name, level in FAMILIES for row in create_dataset(name, size=PROBLEMS, seed=0, **level)]
    return [(row["question"], row["answer"]) for row in made]


def solved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of the [`problems`] that a model solves by its likeliest response."""
    asked = [[{"role": "user", "content": question}] for question, _ in problems()]
    written = respond(model, tokenizer, asked, MAX_TOKENS, batch_size=24)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    return fmean(bool(score(text, answer).correct) for text, (_, answer) in zip(texts, problems(), strict=True))


def responses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The likeliest response to each of the [`prompts`], as token ids."""
    return respond(model, tokenizer, prompts(), MAX_TOKENS, batch_size=16)


def accuracy(tokenizer: PreTrainedTokenizerBase, written: Sequence[Sequence[int]]) -> float:
    """Share of the questions that responses answer."""
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written[: len(QUESTIONS)]]
    return fmean(bool(score_named(text, aliases).correct) for text, (_, aliases) in zip(texts, QUESTIONS, strict=True))


def divergence(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    written: Sequence[Sequence[int]],
) -> float:
    """
    How far a model has moved from its base where nothing was to change: the mean over the base's own responses of
    KL(p_base ‖ p_model) per token, in nats.

    Args:
        model, base ([`~transformers.PreTrainedModel`]):
            Both models.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Their tokenizer.
        written (`Sequence[Sequence[int]]`):
            The base's responses to the [`prompts`].
    """
    model.eval()
    base.eval()
    read = tokenizer.apply_chat_template(
        prompts(), add_generation_prompt=True, return_dict=True, enable_thinking=False
    )["input_ids"]
    means = []
    for prompt, ids in zip(read, written, strict=True):
        tokens = torch.tensor([[*prompt, *ids]])
        with torch.inference_mode():
            ours, theirs = (
                its(tokens.to(its.device), logits_to_keep=len(ids) + 1).logits[0, :-1].float().log_softmax(-1)
                for its in (model, base)
            )
        means.append((theirs.exp() * (theirs - ours.to(theirs.device))).sum(-1).mean().item())
    return fmean(means)


def figures(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    origin: Mapping[str, Any],
) -> dict[str, float]:
    """
    What is left of what a model could do.

    Args:
        model, base ([`~transformers.PreTrainedModel`]):
            The model, and what it was trained from.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Their tokenizer.
        origin (`Mapping[str, Any]`):
            The base's responses, as `"responses"`.

    Returns:
        `dict[str, float]`: `unrelated` and `solved`, accuracies on questions and on problems, and `divergence`.
    """
    return {
        "solved": solved(model, tokenizer),
        "unrelated": accuracy(tokenizer, responses(model, tokenizer)),
        "divergence": divergence(model, base, tokenizer, origin["responses"]),
    }
