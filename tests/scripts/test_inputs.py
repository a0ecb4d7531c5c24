import json

import pytest
from trl import DatasetMixtureConfig
from trl.rewards import accuracy_reward

from trl_opsd.scripts.inputs import SelfDistillationScriptArguments, load_datasets, load_reward_funcs


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{n} + {n}?", "solution": f"{2 * n}"}) + "\n" for n in range(10)))
    return str(path)


@pytest.mark.parametrize("text", ["question", "[question, prompt]", "{question: 3}", "{question"])
def test_bad_column_mapping(text):
    with pytest.raises(ValueError, match="Expected `column_mapping` to map column names"):
        SelfDistillationScriptArguments(column_mapping=text)


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

    assert (model, accuracy.__wrapped__) == ("some/model", accuracy_reward)
    assert overlong(completion_ids=[[0]]) == [0]
    assert short([]) == [1.0]


def test_a_recipe_may_name_a_single_reward_func():
    args = SelfDistillationScriptArguments(reward_funcs="accuracy_reward")

    assert [reward.__wrapped__ for reward in load_reward_funcs(args)] == [accuracy_reward]


def test_rewards_of_trl_read_completions_of_plain_prompts():
    [accuracy] = load_reward_funcs(SelfDistillationScriptArguments(reward_funcs="accuracy_reward"))
    texts = [r"It is \boxed{4}.", r"It is \boxed{5}."]

    as_messages = accuracy(
        completions=[[{"role": "assistant", "content": text}] for text in texts], solution=["4"] * 2
    )

    assert accuracy(completions=texts, solution=["4"] * 2) == as_messages == [1.0, 0.0]


@pytest.mark.parametrize("name", ["acuracy_reward", "no_such_module.reward", "json.no_such_reward"])
def test_unknown_reward_func(name):
    with pytest.raises(ValueError, match=rf"reward function '{name}'.*accuracy_reward"):
        load_reward_funcs(SelfDistillationScriptArguments(reward_funcs=[name]))
