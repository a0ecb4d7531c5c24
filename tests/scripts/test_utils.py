import json
import os
from dataclasses import fields

import pytest
import yaml
from trl import DatasetMixtureConfig
from trl.rewards import accuracy_reward

from trl_opsd.methods import TRAINABLE
from trl_opsd.scripts.train import make_parser
from trl_opsd.scripts.utils import (
    SelfDistillationScriptArguments,
    find_checkpoint,
    load_datasets,
    load_reward_funcs,
    run,
)
from trl_opsd.trainer.checkpoints import begin, finish


CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.fixture
def recipe(tmp_path):
    def write(**fields):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), **CPU, **fields}))
        return str(path)

    return write


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{n} + {n}?", "solution": f"{2 * n}"}) + "\n" for n in range(10)))
    return str(path)


# Recipe files and flags


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


@pytest.mark.parametrize("text", ["question", "[question, prompt]", "{question: 3}", "{question"])
def test_bad_column_mapping(text):
    with pytest.raises(ValueError, match="Expected `column_mapping` to map column names"):
        SelfDistillationScriptArguments(column_mapping=text)


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


# Data, rewards and checkpoints


def test_train_and_test_splits(rows):
    args = SelfDistillationScriptArguments(
        dataset_name=rows, dataset_train_split="train[:80%]", dataset_test_split="train[80%:]", system_prompt="s"
    )

    train, test = load_datasets(args, DatasetMixtureConfig(), with_eval=True)

    assert (len(train), len(test)) == (8, 2)
    assert test[0]["prompt"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "8 + 8?"}]
    assert load_datasets(args, DatasetMixtureConfig(), with_eval=False)[1] is None


def test_streaming(rows):
    args = SelfDistillationScriptArguments(
        dataset_name=rows, dataset_streaming=True, prompt_template="Solve {problem}", column_mapping={"problem": "p"}
    )

    train, _ = load_datasets(args, DatasetMixtureConfig(), with_eval=False)

    assert next(iter(train))["prompt"][0]["content"] == "Solve 0 + 0?"


def test_mixture(rows, caplog):
    mixture = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": rows}] * 2, test_split_size=0.25)
    args = SelfDistillationScriptArguments(dataset_name="not/used")

    train, test = load_datasets(args, mixture, with_eval=True)

    assert (len(train), len(test)) == (15, 5)
    assert train[0]["prompt"][0]["role"] == "user"
    assert "`datasets` is used" in caplog.text


def test_mixture_without_the_split(rows):
    mixture = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": rows}])

    with pytest.raises(ValueError, match=r"no split 'test', only: train\. Set `test_split_size`"):
        load_datasets(SelfDistillationScriptArguments(), mixture, with_eval=True)


def test_no_data():
    with pytest.raises(ValueError, match="set `dataset_name`"):
        load_datasets(SelfDistillationScriptArguments(), DatasetMixtureConfig(), with_eval=False)


def test_reward_funcs(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_test_utils.py").write_text("def short(completions, **kwargs):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    names = ["accuracy_reward", "get_soft_overlong_punishment", "my_rewards_of_test_utils.short"]

    model, accuracy, overlong, short = load_reward_funcs(
        SelfDistillationScriptArguments(reward_funcs=names, reward_model_name_or_path="some/model")
    )

    assert (model, accuracy) == ("some/model", accuracy_reward)
    assert overlong(completion_ids=[[0]]) == [0]
    assert short([]) == [1.0]


def test_single_reward_func_of_a_recipe(recipe):
    script = make_parser("opsd").parse_args_and_config(["--config", recipe(reward_funcs="accuracy_reward")])[0]

    assert load_reward_funcs(script) == [accuracy_reward]


@pytest.mark.parametrize("name", ["acuracy_reward", "no_such_module.reward", "json.no_such_reward"])
def test_unknown_reward_func(name):
    with pytest.raises(ValueError, match=rf"reward function '{name}'.*accuracy_reward"):
        load_reward_funcs(SelfDistillationScriptArguments(reward_funcs=[name]))


def make_checkpoint(folder, *, complete=True):
    begin(folder)
    if complete:
        finish(folder, {})
    return str(folder)


def test_newest_complete_checkpoint(tmp_path):
    make_checkpoint(tmp_path / "checkpoint-9")
    newest = make_checkpoint(tmp_path / "checkpoint-10")
    make_checkpoint(tmp_path / "checkpoint-11", complete=False)
    make_checkpoint(tmp_path / "checkpoint-best")

    for choice in (True, "true", "auto"):
        with pytest.warns(match="checkpoint-11 is incomplete"):
            assert find_checkpoint(choice, str(tmp_path)) == newest
    assert find_checkpoint(newest, str(tmp_path)) == newest
    assert find_checkpoint(None, str(tmp_path)) is find_checkpoint("false", str(tmp_path)) is None


def test_no_checkpoint(tmp_path):
    assert find_checkpoint("auto", str(tmp_path)) is None
    with pytest.raises(ValueError, match=r"is true, but .* has no complete checkpoint"):
        find_checkpoint("true", str(tmp_path))


def test_checkpoint_that_cannot_be_resumed(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint-8 does not exist"):
        find_checkpoint(str(tmp_path / "checkpoint-8"), str(tmp_path))
    with pytest.raises(ValueError, match=r"checkpoint-9 is incomplete"):
        find_checkpoint(make_checkpoint(tmp_path / "checkpoint-9", complete=False), str(tmp_path))


def test_model_is_required(recipe, rows):
    args = make_parser("opsd").parse_args_and_config(["--config", recipe(dataset_name=rows)])

    with pytest.raises(ValueError, match="set `model_name_or_path`"):
        run(*args)
