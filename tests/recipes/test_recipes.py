"""Every file below `recipes/`: what it says of itself, that it is understood, and that it trains."""

import json
import re
from pathlib import Path
from string import Formatter

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from datasets import Dataset
from tiny import make_model, make_tokenizer
from tiny_vlm import make_image, make_vlm

from trl_opsd.methods import METHODS, TRAINABLE
from trl_opsd.scripts.train import make_parser, run


ROOT = Path(__file__).parents[2] / "recipes"
ACCELERATE = sorted(ROOT.glob("accelerate/*.yaml"))
GENERATE = sorted(ROOT.rglob("generate-*.yaml"))  # tried in tests/scripts/test_generate.py
RECIPES = sorted(set(ROOT.rglob("*.y*ml")) - set(ACCELERATE) - set(GENERATE))

# What stands in for the hardware of a recipe
SMALL = {
    "max_steps": 1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "generation_batch_size": None,
    "max_completion_length": 16,  # a solution of these rows, with its end
    "use_vllm": False,
    "generation_kwargs": None,  # vLLM's
    "vllm_importance_sampling_correction": False,
    "bf16": False,
    "gradient_checkpointing": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


FEEDBACK_REWARDS = """
def tests_pass(completions, log_extra, **kwargs):
    log_extra("feedback", ["It does not run."] * len(completions))
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def long_context_model(tmp_path_factory):
    """Folder with a tiny model that has the context of Qwen3."""
    path = tmp_path_factory.mktemp("long-context")
    tokenizer = make_tokenizer()
    make_model(tokenizer, max_position_embeddings=40_960).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def long_context_vlm(tmp_path_factory):
    """The same of a vision-language model, with its processor."""
    path = tmp_path_factory.mktemp("long-context-vlm")
    for part in make_vlm("llava_next", max_position_embeddings=40_960):
        part.save_pretrained(path)
    return str(path)


# By recipe: completions of an update, updates from what is sampled at once, steps or epochs, weight decay
PAPERS = {
    "opsd/qwen3-1.7b": (32, 1, 100, 0.0),
    "opsd/qwen3-4b": (32, 1, 100, 0.0),
    "opsd/qwen3-8b": (32, 1, 100, 0.0),
    "purified_opsd/qwen3-8b": (32, 1, 100, 0.0),
    "opsdc/qwen3-8b": (32, 1, 100, 0.01),
    "opsdc/qwen3-14b": (32, 1, 100, 0.01),
    "pbsd/qwen3-1.7b": (32 * 2, 1, 500, 0.0),
    "pbsd/qwen3-4b": (32 * 2, 1, 500, 0.0),
    "pbsd/qwen3-8b": (32 * 2, 1, 500, 0.0),
    "brts/r1-distill-qwen-1.5b": (64 * 2, 1, 200, 0.01),
    "atmanrl/llama3.2-3b": (48 * 8, 1, "8 epochs", 0.0),
    "vpd/qwen3-8b": (32 * 8, 1, 200, 0.0),
    "vpd/qwen3-8b-feedback": (1 * 8, 32, "30 epochs", 0.0),
    "sdft/qwen2.5-7b": (32, 1, "2 epochs", 0.0),
    "sdft/qwen2.5-3b": (32, 1, "2 epochs", 0.0),
    "sdft/qwen2.5-14b": (32, 1, "2 epochs", 0.0),
    "sdpo/qwen3-8b": (32 * 8, 1, 100, 0.01),
    "sdpo/qwen3-8b-feedback": (1 * 8, 32, "30 epochs", 0.01),
    "sc_sdpo/qwen3-8b": (32 * 8, 1, 200, 0.01),
    "ssopd/qwen3-8b": (32 * 8, 1, 100, 0.0),
    "u_opsd/qwen3-8b": (32 * 8, 1, 150, 0.0),
    "drift/qwen3-8b": (32 * 8, 1, 400, 0.01),
    "drift_code/qwen3-8b": (32 * 8, 1, 400, 0.01),
    "cipo/qwen3-4b": (256 * 8, 1, 500, 0.0),
    "sort/qwen2.5-7b": (128 * 8, 1, 500, 0.0),
    "mopd/qwen3-4b": (32 * 8, 1, 100, 0.01),
    "mopd/qwen3-8b": (32 * 8, 1, 100, 0.01),
    "dasd/qwen3-8b": (32 * 8, 4, 800, 0.0),
    "antisd/qwen3-8b": (32 * 8, 1, 200, 0.0),
    "antisd_code/qwen3-8b": (32 * 8, 1, 200, 0.0),
    "egrsd/qwen3-4b": (32, 1, 100, 0.0),
    "egrsd/qwen3-8b": (32, 1, 100, 0.0),
    "cl_egrsd/qwen3-4b": (32, 1, 100, 0.0),
    "cl_egrsd/qwen3-8b": (32, 1, 100, 0.0),
    "msd/qwen3-8b": (32, 1, "1 epochs", 0.0),
    "sdpg/qwen3-1.7b": (32 * 8, 8, 3200, 0.1),
    "rethinking_opd/deepseek-1.5b": (64 * 4, 1, "1 epochs", 0.0),
    "rethinking_opd_code/deepseek-1.5b": (64 * 4, 1, "1 epochs", 0.0),
    "stable_opd/qwen2.5-math-1.5b": (64 * 4, 1, "1 epochs", 0.0),
    "correct_only/qwen3-8b": (32, 1, 100, 0.0),
    "correct_only/acereason-nemotron-7b": (32, 1, 100, 0.0),
    "correct_only/deepseek-r1-distill-qwen-7b": (32, 1, 100, 0.0),
    "rlsd/qwen3-8b": (256 * 8, 1, 100, 0.0),
    "rlsd/qwen3-vl-8b": (256 * 8, 1, 100, 0.0),
    "rlrt/qwen3-4b-base": (128 * 8, 2, 200, 0.01),
    "rlrt/qwen3-8b-base": (128 * 8, 2, 200, 0.01),
    "rlrt/qwen3-4b-instruct": (128 * 8, 2, 200, 0.01),
    "rlcsd/qwen3-8b": (16 * 8, 4, 400, 0.01),
    "trace/qwen3-8b": (32 * 8, 1, 300, 0.01),
    "trace/qwen3-1.7b-errors": (32 * 8, 1, 300, 0.01),
    "resd/qwen3-4b": (32, 1, 200, 0.0),
    "resd/qwen3-4b-released": (32, 1, 200, 0.0),
    "rlrt/qwen3-8b": (128 * 8, 2, 200, 0.01),
    "rlrt/qwen3-8b-thinking": (128 * 8, 2, 200, 0.01),
    "vopd/qwen3-1.7b-base": (64, 1, "1 epochs", 0.0),
    "vopd/qwen3-4b-base": (64, 1, "1 epochs", 0.0),
    "vopd/olmo-3-7b": (64, 1, "1 epochs", 0.0),
    "star/qwen2.5-1.5b": (80, 1, 500, 0.0),
    "star/gpt-j-6b": (80, 1, 500, 0.0),
}


def name(path):
    return str(path.relative_to(ROOT))


def parser_of(recipe):
    """The parser of the command a recipe is for: its folder is called like the command, or else the file itself."""
    return make_parser(next(command for command in (recipe.parent.name, recipe.stem) if command in TRAINABLE))


def rows_for(recipe):
    """Rows with the columns that a recipe reads its prompt from, and with what contexts read."""
    mapping = recipe.get("column_mapping") or {}
    fields = [field for _, field, _, _ in Formatter().parse(recipe.get("prompt_template") or "") if field]
    columns = [*mapping, *(field for field in fields if field not in mapping.values())]
    rows = []
    for a in range(8):
        row = dict.fromkeys(columns or ["prompt"], f"What is {a} + 1?")
        if "prompt" in row and not columns:
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        solution = f"{a} and 1 make {a + 1}."
        known = {"solution": solution, "answer": str(a + 1), "english": f"{a} + 1?", "about": solution}
        if "teacher_column" in recipe:
            row[recipe["teacher_column"]] = list(recipe["teachers"])[a % 2]
        rows.append(row | {name: text for name, text in known.items() if name not in mapping.values()})
    return rows


def test_recipes_are_found():
    assert {recipe.parent.name for recipe in RECIPES} >= {*METHODS, "playground"}
    assert {recipe.stem for recipe in RECIPES if recipe.parent.name == "playground"} == set(METHODS)
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


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.parent.name in METHODS], ids=name)
def test_paper_recipe_has_the_batch_of_the_paper(recipe, tmp_path):
    batch, updates, length, weight_decay = PAPERS[name(recipe).removesuffix(".yaml")]
    values = yaml.safe_load(recipe.read_text())
    path = tmp_path / recipe.name
    path.write_text(yaml.safe_dump(values | {"use_cpu": True, "bf16": False}))
    _, config, *_ = parser_of(recipe).parse_args_and_config(["--config", str(path)])
    num_gpus = int(re.search(r"(\d+) GPUs", recipe.read_text()).group(1))
    assert num_gpus * config.per_device_train_batch_size * config.gradient_accumulation_steps == batch
    assert values.get("generation_batch_size", batch) == updates * batch
    assert batch % config.num_generations == 0
    assert (config.max_steps if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs") == length
    assert config.weight_decay == weight_decay


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_recipe_trains_a_tiny_model(recipe, long_context_model, long_context_vlm, tmp_path, device, monkeypatch):
    values = yaml.safe_load(recipe.read_text())
    data, model = tmp_path / "rows.jsonl", long_context_model
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_for(values)))
    if "-VL-" in values["model_name_or_path"]:
        data, model = tmp_path / "rows", long_context_vlm
        rows = [{**row, "image": make_image(seed)} for seed, row in enumerate(rows_for(values))]
        Dataset.from_list(rows).save_to_disk(data)
    output = tmp_path / "output"
    local = {"model_name_or_path": model, "dataset_name": str(data), "output_dir": str(output)}
    values |= SMALL | local | {"dataset_config": None, "use_cpu": device.type == "cpu"}
    for teacher in (values, *values.get("teachers", {}).values()):
        if "teacher_model_name_or_path" in teacher:
            teacher["teacher_model_name_or_path"] = long_context_model
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    # Stands for a reward that a recipe leaves to its user
    (tmp_path / "feedback_rewards.py").write_text(FEEDBACK_REWARDS)
    monkeypatch.syspath_prepend(tmp_path)

    run(*parser_of(recipe).parse_args_and_config(["--config", str(path)]))

    saved = "adapter_model.safetensors" if values.get("use_peft") else "model.safetensors"
    assert (output / saved).is_file()
    assert (output / "processor_config.json").is_file() == (model == long_context_vlm)


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
