"""Every file below `recipes/`: what it says of itself, that it is understood, and that it trains."""

import json
import re
from pathlib import Path
from string import Formatter

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from tiny import make_model, make_tokenizer

from trl_opsd.methods import TRAINABLE
from trl_opsd.scripts.train import make_parser, run


ROOT = Path(__file__).parents[2] / "recipes"
ACCELERATE = sorted(ROOT.glob("accelerate/*.yaml"))
GENERATE = sorted(ROOT.rglob("generate-*.yaml"))  # tried in tests/scripts/test_generate.py
RECIPES = sorted(set(ROOT.rglob("*.y*ml")) - set(ACCELERATE) - set(GENERATE))

# What stands in for the hardware of a recipe
SMALL = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 8,
    "use_vllm": False,
    "bf16": False,
    "gradient_checkpointing": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def long_context_model(tmp_path_factory):
    """Folder with a tiny model that has the context of Qwen3."""
    path = tmp_path_factory.mktemp("long-context")
    tokenizer = make_tokenizer()
    make_model(tokenizer, max_position_embeddings=40_960).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def name(path):
    return str(path.relative_to(ROOT))


def parser_of(recipe):
    """The parser of the command a recipe is for: its folder is called like the command, or else the file itself."""
    return make_parser(next(command for command in (recipe.parent.name, recipe.stem) if command in TRAINABLE))


def rows_for(recipe):
    """Rows with the columns that a recipe reads its prompt from, and with a solution and an answer."""
    columns = [field for _, field, _, _ in Formatter().parse(recipe.get("prompt_template") or "") if field]
    columns += recipe.get("column_mapping") or {}
    rows = []
    for a in range(4):
        row = dict.fromkeys(columns or ["prompt"], f"What is {a} + 1?")
        if "prompt" in row and not columns:
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        rows.append(row | {"solution": f"{a} and 1 make {a + 1}.", "answer": str(a + 1)})
    return rows


def test_recipes_are_found():
    assert {recipe.parent.name for recipe in RECIPES} >= {"opsd", "opsdc", "playground"}
    assert {path.stem for path in ACCELERATE} >= {"single", "ddp", "zero2", "zero3", "fsdp2"}


@pytest.mark.parametrize("recipe", [*RECIPES, *GENERATE], ids=name)
def test_first_line_states_hardware_and_time(recipe):
    first_line = recipe.read_text().splitlines()[0]
    assert first_line.startswith("# ")
    assert re.search(r"\bGPUs?\b|\bCPU\b", first_line), "the first line must state the hardware"
    assert re.search(r"\b(seconds?|minutes?|hours?)\b", first_line), "the first line must state the expected time"


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_recipe_is_understood(recipe, tmp_path):
    values = yaml.safe_load(recipe.read_text())
    # No machine that runs this test need have the hardware.
    path = tmp_path / recipe.name
    path.write_text(yaml.safe_dump(values | {"use_cpu": True, "bf16": False}))
    parsed = parser_of(recipe).parse_args_and_config(["--config", str(path)])
    for key, value in values.items():
        [holder] = [group for group in parsed if hasattr(group, key)]
        if isinstance(value, int | float) and key not in ("use_cpu", "bf16"):
            assert getattr(holder, key) == value


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_misspelt_key_is_refused(recipe, tmp_path):
    path = tmp_path / recipe.name
    path.write_text(f"{recipe.read_text()}\nlearning_rat: 1.0e-6\n")
    with pytest.raises(ValueError, match="learning_rat"):
        parser_of(recipe).parse_args_and_config(["--config", str(path)])


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.parent.name in ("opsd", "opsdc")], ids=name)
def test_paper_recipe_has_the_batch_of_the_paper(recipe, tmp_path):
    path = tmp_path / recipe.name
    path.write_text(f"{recipe.read_text()}\nuse_cpu: true\nbf16: false\n")
    _, config, *_ = parser_of(recipe).parse_args_and_config(["--config", str(path)])
    num_gpus = int(re.search(r"(\d+) GPUs", recipe.read_text()).group(1))
    assert num_gpus * config.per_device_train_batch_size * config.gradient_accumulation_steps == 32
    assert config.max_steps == 100
    assert config.weight_decay == {"opsd": 0.0, "opsdc": 0.01}[recipe.parent.name]


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_recipe_trains_a_tiny_model(recipe, long_context_model, tmp_path, device):
    values = yaml.safe_load(recipe.read_text())
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_for(values)))
    output = tmp_path / "output"
    local = {"model_name_or_path": long_context_model, "dataset_name": str(data), "output_dir": str(output)}
    values |= SMALL | local | {"dataset_config": None, "use_cpu": device.type == "cpu"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))

    run(*parser_of(recipe).parse_args_and_config(["--config", str(path)]))

    saved = "adapter_model.safetensors" if values.get("use_peft") else "model.safetensors"
    assert (output / saved).is_file()


@pytest.mark.parametrize("path", ACCELERATE, ids=name)
def test_accelerate_config(path):
    assert re.match(r"# .*GPU", path.read_text()), "the first line must say what it is and for which hardware"
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    kind = path.stem.rstrip("0123456789")
    expected = {"single": "NO", "ddp": "MULTI_GPU", "zero": "DEEPSPEED", "fsdp": "FSDP"}[kind]
    assert config.distributed_type == expected
    assert config.mixed_precision == "bf16"
    assert (config.num_processes == 1) == (kind == "single")
    if kind == "zero":
        stage = int(path.stem.removeprefix("zero"))
        assert config.deepspeed_config["zero_stage"] == stage
        # Else a model of this size is first built whole on every GPU, and never saved as one.
        assert config.deepspeed_config.get("zero3_init_flag", False) == (stage == 3)
        assert config.deepspeed_config.get("zero3_save_16bit_model", False) == (stage == 3)
    if kind == "fsdp":
        assert config.fsdp_config["fsdp_version"] == int(path.stem.removeprefix("fsdp"))
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
