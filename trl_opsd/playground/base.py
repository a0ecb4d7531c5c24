"""The base models of the embedded world: supervised training that leaves a gap for self-distillation to close."""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from ..context import TemplateContext
from ..files import whole_folder
from .world import make_config, make_tokenizer


if TYPE_CHECKING:
    from _typeshed import DataclassInstance


_SETTINGS_FILE = "base_settings.json"


@dataclass(frozen=True)
class BaseRecipe:
    """
    Supervised training of a base model.

    Args:
        steps (`int`):
            Number of optimizer steps.
        context_share (`float`):
            Share of the rows whose prompt holds the privileged context. The rest show the bare question.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows per step.
        learning_rate (`float`, *optional*, defaults to `2e-3`):
            Peak learning rate, reached after 30 steps and followed by a cosine decay.
    """

    steps: int
    context_share: float
    batch_size: int = 32
    learning_rate: float = 2e-3


BASE_RECIPES = {
    # Copying a solution is learnt within 300 steps, adding from the remaining rows is not: that is the gap. With 320
    # steps instead of 400, one base in three could not yet copy well enough to be its own teacher.
    "opsd": BaseRecipe(steps=400, context_share=0.85),
    "opsdc": BaseRecipe(steps=420, context_share=0.5),
}


def train_base(
    folder: Path,
    world: "DataclassInstance",
    recipe: BaseRecipe,
    context: TemplateContext,
    rows: Dataset,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """
    Trains a base model from scratch and saves it with its tokenizer.

    The folder appears in one piece at the very end, so that an interrupted training leaves nothing that looks
    finished.

    Args:
        folder (`Path`):
            Where the model goes.
        world (`DataclassInstance`):
            What the rows were made by, such as a [`~trl_opsd.playground.world.World`].
        recipe ([`BaseRecipe`]):
            Settings of the training.
        context ([`TemplateContext`]):
            Writes the prompts that hold the privileged context. Those are answered by the row's `"brief"` column, the
            bare questions by its `"solution"`.
        rows ([`~datasets.Dataset`]):
            The world's base rows.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initial weights and of the order of the rows.
        on_step (`Callable[[int, float], None]`, *optional*):
            Called with the number of finished steps and the loss.
    """
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(make_config(tokenizer))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 30) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / recipe.steps)) / 2),
    )
    batches = _batches(rows, tokenizer, recipe, context, random.Random(seed))
    model.train()
    for step in range(1, recipe.steps + 1):
        input_ids, attention_mask, is_target = next(batches)
        hidden = model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        targets = is_target[:, 1:]
        loss = nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][targets]), input_ids[:, 1:][targets])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        on_step(step, loss.item())

    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / _SETTINGS_FILE).write_text(json.dumps(_settings(world, recipe, context, seed), indent=2))


def has_base(
    folder: Path, world: "DataclassInstance", recipe: BaseRecipe, context: TemplateContext, seed: int = 0
) -> bool:
    """
    Whether a folder holds a finished base model of exactly these settings.
    """
    settings = folder / _SETTINGS_FILE
    return settings.is_file() and json.loads(settings.read_text()) == _settings(world, recipe, context, seed)


def _settings(world: "DataclassInstance", recipe: BaseRecipe, context: TemplateContext, seed: int) -> dict[str, Any]:
    return {"world": asdict(world), "recipe": asdict(recipe), "context": context.template, "seed": seed}


def _batches(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    recipe: BaseRecipe,
    context: TemplateContext,
    rng: random.Random,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless batches of input ids, attention mask and the mask of the tokens to learn."""
    examples = list(rows)
    order: list[int] = []
    while True:
        sequences = []
        for _ in range(recipe.batch_size):
            if not order:
                order = rng.sample(range(len(examples)), len(examples))
            row = examples[order.pop()]
            with_context = rng.random() < recipe.context_share
            messages = context.teacher_messages(row, None) if with_context else row["prompt"]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            completion = row["brief"] if with_context else row["solution"]
            prompt_ids, target_ids = tokenizer([prompt, completion + tokenizer.eos_token])["input_ids"]
            sequences.append((prompt_ids, target_ids))
        width = max(len(prompt_ids) + len(target_ids) for prompt_ids, target_ids in sequences)
        input_ids = torch.full((len(sequences), width), tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        is_target = torch.zeros_like(input_ids, dtype=torch.bool)
        for index, (prompt_ids, target_ids) in enumerate(sequences):
            length = len(prompt_ids) + len(target_ids)
            input_ids[index, :length] = torch.tensor(prompt_ids + target_ids)
            attention_mask[index, :length] = 1
            is_target[index, len(prompt_ids) : length] = True
        yield input_ids, attention_mask, is_target
