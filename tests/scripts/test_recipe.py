import os
from dataclasses import fields

import pytest
import yaml

from trl_opsd.methods import TRAINABLE
from trl_opsd.scripts.train import make_parser


CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.fixture
def recipe(tmp_path):
    def write(**fields):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), **CPU, **fields}))
        return str(path)

    return write


def test_recipe_and_flags_fill_every_dataclass(recipe):
    path = recipe(
        model_name_or_path="some/model",
        lora_r=3,
        learning_rate="5e-6",
        column_mapping={"question": "prompt"},
        context_kwargs={"column": "reference"},
        chat_template_kwargs={"enable_thinking": False},
        test_split_size=0.25,
    )

    script, training, model, mixture = make_parser("opsd").parse_args_and_config(
        ["--config", path, "--lora_r", "4", "--teacher_chat_template_kwargs", '{"enable_thinking": true}']
    )

    assert script.column_mapping == {"question": "prompt"}
    assert training.learning_rate == 5e-6
    assert training.context_kwargs == {"column": "reference"}
    assert training.chat_template_kwargs == {"enable_thinking": False}
    assert training.teacher_chat_template_kwargs == {"enable_thinking": True}
    assert (model.model_name_or_path, model.lora_r) == ("some/model", 4)
    assert mixture.test_split_size == 0.25


def test_config_may_be_assigned(recipe):
    assert make_parser("opsd").parse_args_and_config([f"--config={recipe(max_steps=7)}"])[1].max_steps == 7


def test_bare_no_is_a_strategy(tmp_path, recipe):
    path = recipe()
    with open(path, "a") as file:
        file.write("save_strategy: no\nlogging_strategy: no\n")

    training = make_parser("opsd").parse_args_and_config(["--config", path])[1]

    assert training.save_strategy == training.logging_strategy == "no"


def read(recipe, line):
    path = recipe()
    with open(path, "a") as file:
        file.write(f"{line}\n")
    parsed = make_parser("opsd").parse_args_and_config(["--config", path])
    key = line.partition(":")[0]
    return next(getattr(one, key) for one in parsed if hasattr(one, key))


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (
            "lr_scheduler_kwargs: {min_lr: 1e-7, nested: [2E5, 1.5e3, .5e-1], text: '1e-7'}",
            {"min_lr": 1e-7, "nested": [2e5, 1.5e3, 0.05], "text": "1e-7"},
        ),
        ("reward_weights: [1e-3, 2]", [1e-3, 2.0]),
        ("learning_rate: 1e-7", 1e-7),
        ("learning_rate: 1", 1.0),
        ("model_revision: 12e4567", "12e4567"),  # a commit, not a number
        ("run_name: 2024", "2024"),
        ("resume_from_checkpoint: true", "True"),
        ("divergence_clip: null", None),
        ("lora_target_modules: all-linear", "all-linear"),
    ],
)
def test_values_of_a_recipe(recipe, line, value):
    found = read(recipe, line)
    assert found == value
    assert type(found) is type(value) or isinstance(found, int)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed: null", "`seed` must be of type int, got None"),
        ("max_steps: 2.5", "`max_steps` must be of type int, got 2.5"),
        ("max_steps: true", "`max_steps` must be of type int, got True"),
        ("learning_rate: [1e-6]", "`learning_rate` must be of type float, got"),
        ("bf16: {on: true}", "`bf16` must be of type bool .* got"),
        ("reward_weights: [a, 1]", "`reward_weights` must be of type list.* got"),
        ("num_generations: 2.0", "`num_generations` must be of type int.* got 2.0"),
    ],
)
def test_values_of_another_type(recipe, line, message):
    with pytest.raises(ValueError, match=message):
        read(recipe, line)


def test_recipe_that_is_no_mapping(tmp_path):
    (tmp_path / "list.yaml").write_text("- a list\n")
    with pytest.raises(ValueError, match="must be a mapping of fields to values"):
        make_parser("opsd").parse_args_and_config(["--config", str(tmp_path / "list.yaml")])


def test_environment_of_a_recipe(recipe, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    make_parser("opsd").parse_args_and_config(["--config", recipe(env={"SOME_NUMBER": 1})])
    assert os.environ["SOME_NUMBER"] == "1"


@pytest.mark.parametrize("text", ['{"question": "prompt", "n": "m"}', "{question: prompt, n: m}"])
def test_column_mapping_on_the_command_line(text, recipe):
    args = ["--config", recipe(), "--column_mapping", text]

    assert make_parser("opsd").parse_args_and_config(args)[0].column_mapping == {"question": "prompt", "n": "m"}


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("learning_rat", "Did you mean `learning_rate`"),
        ("learning-rate", "Did you mean `learning_rate`"),
        ("xyzzy", "`--help` lists every field"),
        ("compile_divergence", "is none any more: set `divergence_kernel`"),
        ("num_processes", "belongs to `accelerate launch`"),
        ("accelerate_config", "belongs to `accelerate launch`"),
    ],
)
def test_unknown_key(key, hint, recipe):
    with pytest.raises(ValueError, match=rf"Unknown field: `{key}`.*{hint}|Unknown field: `{key}` {hint}"):
        make_parser("opsd").parse_args_and_config(["--config", recipe(**{key: 1})])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--learning_rat", "1"], r"the flag `--learning_rat`\. Did you mean `--learning_rate`"),
        # Not an abbreviation of `--learning_rate`.
        (["--learning=1"], r"the flag `--learning`\. Did you mean"),
        (["--num_processes", "2"], r"the flag `--num_processes` belongs to `accelerate launch`"),
        (["recipe.yaml"], r"`recipe.yaml`\. Did you mean `--config recipe.yaml`"),
        (["--config"], r"`--config` needs the path"),
    ],
)
def test_unknown_argument(args, message):
    with pytest.raises(ValueError, match=message):
        make_parser("opsd").parse_args_and_config(args)


def test_wrong_value_is_told_without_the_whole_usage(capsys):
    with pytest.raises(SystemExit):
        make_parser("opsd", prog="trl-opsd opsd").parse_args_and_config(["--divergence", "kl"])

    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("trl-opsd opsd: error: argument --divergence: invalid choice: 'kl'")


@pytest.mark.parametrize("method", TRAINABLE)
def test_help_explains_every_field(method):
    parser = make_parser(method)

    assert "--config recipe.yaml" in parser.format_help()
    explained = {action.dest: action.help for action in parser._actions}
    assert all(explained[field.name] for cls in parser.dataclass_types for field in fields(cls))
