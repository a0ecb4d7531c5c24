import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd.context import TemplateContext
from trl_opsd.playground.base import BASE_RECIPES, BaseRecipe, _batches, has_base, train_base
from trl_opsd.playground.world import WORLDS, World, make_tokenizer


WORLD = World(digits=2, base_rows=32, train_rows=1, test_rows=1, chatty=True)
RECIPE = BaseRecipe(steps=2, context_share=0.5, batch_size=4)
CONTEXT = TemplateContext("Be brief: {prompt}")


@pytest.fixture(scope="module")
def rows():
    return WORLD.splits(0)["base"]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_base_loads_and_is_recognised_by_its_settings_only(tmp_path, rows):
    folder, steps = tmp_path / "base", []
    train_base(folder, WORLD, RECIPE, CONTEXT, rows, seed=1, on_step=lambda step, loss: steps.append((step, loss)))
    assert [step for step, _ in steps] == [1, 2]
    assert all(loss > 0 for _, loss in steps)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert 500_000 < model.num_parameters() < 2_000_000
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id

    assert has_base(folder, WORLD, RECIPE, CONTEXT, seed=1)
    assert not has_base(folder, WORLD, RECIPE, CONTEXT, seed=2)
    assert not has_base(folder, WORLD, replace(RECIPE, steps=3), CONTEXT, seed=1)
    assert not has_base(folder, WORLD, RECIPE, TemplateContext("Short: {prompt}"), seed=1)
    assert not has_base(folder, replace(WORLD, base_rows=31), RECIPE, CONTEXT, seed=1)


def test_an_interrupted_base_is_not_taken_for_a_finished_one(tmp_path, rows, monkeypatch):
    folder = tmp_path / "base"

    def stop(step, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_base(folder, WORLD, RECIPE, CONTEXT, rows, on_step=stop)
    assert not has_base(folder, WORLD, RECIPE, CONTEXT)

    # Cut off while the files are written
    with monkeypatch.context() as patch:
        patch.setattr("trl_opsd.playground.base._settings", stop)
        with pytest.raises(TypeError):
            train_base(folder, WORLD, RECIPE, CONTEXT, rows)
    assert not folder.exists()

    train_base(folder, WORLD, RECIPE, CONTEXT, rows)
    assert has_base(folder, WORLD, RECIPE, CONTEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_base_is_a_function_of_its_seed(tmp_path, rows):
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        train_base(tmp_path / name, WORLD, RECIPE, CONTEXT, rows, seed)
    first, again, other = (weights(tmp_path / name) for name in ("first", "again", "other"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("share", "column"), [(1.0, "brief"), (0.0, "solution")])
def test_rows_with_the_context_are_answered_briefly(rows, share, column):
    tokenizer = make_tokenizer()
    recipe = replace(RECIPE, context_share=share, batch_size=8)
    input_ids, attention_mask, is_target = next(_batches(rows, tokenizer, recipe, CONTEXT, random.Random(0)))
    by_question = {row["prompt"][-1]["content"]: row for row in rows}
    for ids, mask, target in zip(input_ids, attention_mask.bool(), is_target, strict=True):
        prompt = tokenizer.decode(ids[mask & ~target])
        question = prompt.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        assert question.startswith("Be brief: ") == (share == 1.0)
        expected = by_question[question.removeprefix("Be brief: ")][column] + tokenizer.eos_token
        assert tokenizer.decode(ids[target]) == expected
        assert (ids[~mask] == tokenizer.pad_token_id).all()


def test_every_world_has_a_base():
    assert set(BASE_RECIPES) == set(WORLDS)
