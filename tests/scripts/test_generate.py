"""`trl-opsd generate`, with a tiny model."""

import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_opsd import cli
from trl_opsd.files import locked
from trl_opsd.generate import MAKERS as ALL_MAKERS
from trl_opsd.sampling import loading
from trl_opsd.sampling.transformers import TransformersBackend
from trl_opsd.scripts.generate import make_parser


# What makers of the tests are told beyond their name
MAKERS = {
    "star": {"privileged_context": "answer"},
    "mixsd": {"privileged_context": "answer"},
    "pbsd": {"privileged_context": "answer", "reward_funcs": None},
    "tessy": {
        "privileged_context": "answer",
        "reward_funcs": None,
        "maker_kwargs": {
            "boundary": "rewards_of_test_generate.vowels",
            "end_of_thinking": "e",
            "answer_tokens": 150,
            "max_tries": 9,
        },
    },
}
ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("recipes/*/generate-*.yaml"))


def even(completions, number, **kwargs):
    """Of plain text and of messages: right where the sum of an even row's number and the length is even."""
    texts = [its if isinstance(its, str) else its[-1]["content"] for its in completions]
    return [float((len(text) + int(n)) % 2 == 0) for text, n in zip(texts, number, strict=True)]


def vowels(before, written, by):
    """The student's part ends with a vowel, the teacher's with another character."""
    assert by in ("student", "teacher")
    assert all(written)
    places = [[(c in "aeiou") == (by == "student") for c in text] for text in written]
    return [its.index(True) + 1 if True in its else None for its in places]


def write_rows(path, plain=False, count=8):
    rows = [{"prompt": f"{n} + 1?", "answer": str(n + 1), "number": n} for n in range(count)]
    if not plain:
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def generate(model_path, tmp_path, monkeypatch):
    """Runs the command into tmp_path/run, and returns its exit status."""
    (tmp_path / "rewards_of_test_generate.py").write_text("\n\n\n".join(map(inspect.getsource, (even, vowels))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_rows(tmp_path / "rows.jsonl")

    def run(maker, *args, output_dir="run", **fields):
        settings = {
            "model_name_or_path": model_path,
            "backend": "transformers",
            "batch_size": 3,
            "dataset_name": "rows.jsonl",
            "reward_funcs": "rewards_of_test_generate.even",
            "max_new_tokens": 200,
            "output_dir": output_dir,
            **MAKERS.get(maker, {}),
            **fields,
        }
        Path("recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
        return cli.main(["generate", maker, "--config", "recipe.yaml", *args])

    return run


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_star_end_to_end(generate, capsys):
    assert generate("star") == 0

    records, summary = lines("run/data/train.jsonl"), json.loads(Path("run/summary.json").read_text())
    assert summary["rows"] == 8
    assert sum(summary["kept"].values()) == len(records)
    assert sum(summary["kept"].values()) + sum(summary["dropped"].values()) == 8
    assert set(summary["kept"]) == {"first_try", "hinted_retry"}
    rows = lines("rows.jsonl")
    completions = {(entry["row"], entry["seed"]): entry for entry in lines("run/completions.jsonl")}
    for record in records:
        assert record["prompt"] == rows[record["row"]]["prompt"]
        assert record["completion"] == completions[record["row"], record["seed"]]["completion"]
        assert (record["correct"], record["reward"], record["truncated"]) == (True, 1.0, False)
        assert record["model"]
    printed = capsys.readouterr()
    assert f"{len(records)} records of 8 rows" in printed.out
    for what in ("first tries", "hinted retries"):  # how far it is, how long it took, and how long it will take
        assert re.search(rf"{what}: +\d+%.*[1-9]/\d \[\d+:\d+<\d+:\d+", printed.err)


@pytest.mark.parametrize("maker", list(MAKERS))
def test_an_interrupted_run_goes_on_and_ends_like_one_that_was_not(generate, monkeypatch, capsys, maker):
    assert generate(maker, output_dir="whole") == 0
    whole = lines("whole/completions.jsonl")
    method = "generate_mixed" if maker == "mixsd" else "generate"
    own = getattr(TransformersBackend, method)
    made = []

    def interrupted(self, requests, sampling):
        for item in own(self, requests, sampling):
            if len(made) == 4:
                raise KeyboardInterrupt
            made.append(item)
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(TransformersBackend, method, interrupted)
        assert generate(maker) == 130
    assert "interrupted. All finished completions are kept" in capsys.readouterr().err
    assert lines("run/completions.jsonl") == whole[:4]
    assert not Path("run/data").exists()
    with open("run/completions.jsonl", "a") as file:
        file.write('{"row": 4, "pro')  # as a killed run leaves it

    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(TransformersBackend, method, lambda *args: asked.append(len(args[1])) or own(*args))
        assert generate(maker, batch_size=2) == 0
    assert sum(asked) == len(whole) - 4
    assert lines("run/completions.jsonl") == whole
    assert Path("run/data/train.jsonl").read_bytes() == Path("whole/data/train.jsonl").read_bytes()


def test_a_finished_run_loads_no_model_and_grows(generate, monkeypatch):
    fields = {"maker_kwargs": {"num_samples": 2, "keep": "all"}}
    assert generate("rollouts", "--limit", "3", **fields) == 0
    assert len(lines("run/data/train.jsonl")) == 6
    before = lines("run/completions.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_backend", lambda *args, **kwargs: pytest.fail("loaded a model for nothing"))
        assert generate("rollouts", "--limit", "3", maker_kwargs={"keep": "all"}) == 0
        assert len(lines("run/data/train.jsonl")) == 3
        # Another threshold grades anew what is there
        assert generate("rollouts", "--limit", "3", success_threshold=2.0, **fields) == 0
        assert not any(record["correct"] for record in lines("run/data/train.jsonl"))
    assert generate("rollouts", "--limit", "4", **fields) == 0
    after = lines("run/completions.jsonl")
    assert after[:6] == before
    assert len(after) == 8
    seeds = [record["seed"] for record in lines("run/data/train.jsonl")]
    assert len(set(seeds)) == 8


def test_rows_with_the_same_prompt_get_completions_of_their_own(generate, tmp_path):
    write_rows(tmp_path / "rows.jsonl", count=1)
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text() * 3)
    assert generate("rollouts", maker_kwargs={"keep": "all"}) == 0
    assert len({record["seed"] for record in lines("run/data/train.jsonl")}) == 3


@pytest.mark.parametrize("maker", ["star", "mixsd", "tessy"])
@pytest.mark.parametrize("plain", [False, True], ids=["conversational", "plain"])
def test_trl_trains_on_it_as_it_is(generate, plain, maker, tmp_path, model_path, training_args):
    write_rows(tmp_path / "rows.jsonl", plain)
    kwargs = None if plain else {"enable_thinking": False}
    assert generate(maker, chat_template_kwargs=kwargs) == 0

    dataset = load_dataset("run/data")["train"]  # as `trl sft --dataset_name run/data` does
    assert len(dataset) > 2
    for name in ("max_completion_length", "per_device_train_batch_size"):
        training_args.pop(name)
    args = SFTConfig(**training_args, per_device_train_batch_size=2)
    trainer = SFTTrainer(model_path, args=args, train_dataset=dataset)
    trainer.train()
    assert trainer.state.global_step == 2

    # What is learnt is the completion as it was sampled, after the prompt it is an answer to
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    sampled = {entry["seed"]: entry["token_ids"] for entry in lines("run/completions.jsonl")}
    for row, record in zip(trainer.train_dataset, dataset, strict=True):
        if plain:
            prompt = tokenizer(record["prompt"])["input_ids"]
        else:
            prompt = tokenizer.apply_chat_template(
                record["prompt"], add_generation_prompt=True, return_dict=True, enable_thinking=False
            )["input_ids"]
            # The template of the tests shows the answer without the empty thought, and ends the turn with a new line
            prompt = prompt[: len(prompt) - 2 - 4]
            assert record["chat_template_kwargs"] == {"enable_thinking": False}
        assert row["input_ids"][: len(prompt)] == prompt
        text = tokenizer.decode(sampled[record["seed"]], skip_special_tokens=True)
        if maker == "tessy":
            text = "".join(span["text"] for span in record["spans"])
        assert text in tokenizer.decode(row["input_ids"][len(prompt) :])


def trained_by_dpo(model_path, training_args):
    dataset = load_dataset("run/data")["train"]  # as `trl dpo --dataset_name run/data` does
    for name in ("max_completion_length", "per_device_train_batch_size"):
        training_args.pop(name)
    trainer = DPOTrainer(
        model_path, args=DPOConfig(**training_args, per_device_train_batch_size=2), train_dataset=dataset
    )
    trainer.train()
    assert trainer.state.global_step == 2
    return dataset


@pytest.mark.parametrize("plain", [False, True], ids=["conversational", "plain"])
def test_dpo_trains_on_pairs(generate, plain, tmp_path, model_path, training_args):
    write_rows(tmp_path / "rows.jsonl", plain)
    assert generate("pbsd", chat_template_kwargs=None if plain else {"enable_thinking": False}) == 0

    dataset = trained_by_dpo(model_path, training_args)
    rows, tokenizer = lines("rows.jsonl"), AutoTokenizer.from_pretrained(model_path)
    sampled = {entry["seed"]: entry["completion"] for entry in lines("run/completions.jsonl")}
    for record in dataset:
        assert record["prompt"] == rows[record["row"]]["prompt"]
        assert [record["chosen"], record["rejected"]] == [sampled[record[f"{n}_seed"]] for n in ("chosen", "rejected")]
    # The teacher's prompt is the one with the answer
    made = {entry["seed"]: entry["prompt"] for entry in lines("run/completions.jsonl")}
    assert not {made[record["chosen_seed"]] for record in dataset} & {
        made[record["rejected_seed"]] for record in dataset
    }
    assert len(tokenizer) > 0


def test_changing_the_context_changes_the_teacher_alone(generate):
    texts = []
    for output_dir, template in (("one", "{prompt} {answer}"), ("two", "{prompt} It is {answer}.")):
        fields = {"context_kwargs": {"template": template}, "maker_kwargs": {"keep": "all"}}
        assert generate("pbsd", output_dir=output_dir, **fields) == 0
        texts.append(lines(f"{output_dir}/data/train.jsonl"))
    assert [record["rejected"] for record in texts[0]] == [record["rejected"] for record in texts[1]]
    assert [record["chosen"] for record in texts[0]] != [record["chosen"] for record in texts[1]]
    assert [record["prompt"] for record in texts[0]] == [record["prompt"] for record in texts[1]]


def test_mixed_tokens_say_where_they_come_from(generate):
    assert generate("mixsd", temperature=0.0, success_threshold=0.0, maker_kwargs={"share": 0.5}) == 0
    by_seed = {entry["seed"]: entry for entry in lines("run/completions.jsonl")}
    records = lines("run/data/train.jsonl")
    for record in records:
        assert len(record["sides"]) == len(by_seed[record["seed"]]["token_ids"])
    assert {side for record in records for side in record["sides"]} == {True, False}
    # Another share is another completion, and those of the first stay
    assert generate("mixsd", temperature=0.0, success_threshold=0.0, maker_kwargs={"share": 1, "max_tries": 1}) == 0
    assert all(all(record["sides"]) for record in lines("run/data/train.jsonl"))
    assert lines("run/completions.jsonl")[: len(by_seed)] == list(by_seed.values())


def test_a_second_model_writes_as_the_teacher(generate, model_path, tmp_path, capsys):
    shutil.copytree(model_path, tmp_path / "teacher")
    teacher = {"model_name_or_path": "teacher", "backend": "transformers", "batch_size": 2}
    fields = {"privileged_context": None, "teacher": teacher}
    assert generate("tessy", **fields) == 0
    records = lines("run/data/train.jsonl")
    assert {record["source"] for record in records} == {"teacher_and_student"}
    assert {record["teacher_model"] for record in records} == {"teacher"}
    assert {span["by"] for record in records for span in record["spans"]} == {"student", "teacher"}
    assert lines("run/teacher_completions.jsonl")

    before = [Path(f"run/{name}completions.jsonl").read_bytes() for name in ("", "teacher_")]
    assert generate("tessy", **fields) == 0
    assert [Path(f"run/{name}completions.jsonl").read_bytes() for name in ("", "teacher_")] == before
    (tmp_path / "teacher" / "model.safetensors").touch()
    assert generate("tessy", **fields) == 2
    assert "`teacher` was" in capsys.readouterr().err


def test_dpo_trains_on_what_the_maker_of_the_docs_makes(generate, tmp_path, model_path, training_args, monkeypatch):
    page = (ROOT / "docs" / "generate.md").read_text()
    (tmp_path / "makers_of_test_generate.py").write_text(page.split("```python\n")[-1].split("```")[0])
    assert generate("makers_of_test_generate.Pairs", reward_funcs=None, privileged_context="answer") == 0

    dataset = trained_by_dpo(model_path, training_args)
    assert len(dataset) == 8
    assert all(row["chosen"] != row["rejected"] for row in dataset)


def test_completions_that_do_not_fit_the_model_are_refused(generate, capsys):
    assert generate("rollouts", max_new_tokens=4096) == 2
    error = capsys.readouterr().err
    assert "The prompt of row 0 has" in error
    assert "Lower `max_new_tokens` to at most" in error


@pytest.mark.parametrize(
    ("maker", "fields", "message"),
    [
        ("star", {"reward_funcs": None}, "The maker star has to tell right from wrong. Set `reward_funcs`."),
        (
            "rollouts",
            {"reward_funcs": None, "maker_kwargs": {"keep": "correct"}},
            "The maker rollouts has to tell right from wrong",
        ),
        ("star", {"privileged_context": "solution"}, "rows.jsonl has no column `solution`"),
        ("star", {"privileged_context": None}, "Set `privileged_context`, for example to answer."),
        ("star", {"privileged_context": "peers"}, "`privileged_context='peers'` reads them, or samples"),
        ("star", {"privileged_context": "reflection"}, "Choose a context that does neither"),
        ("star", {"privileged_context": "plan"}, "Choose a context that does neither"),
        ("star", {"privileged_context": "none"}, "`privileged_context='none'` is none"),
        ("star", {"privileged_context": "anwser"}, "Did you mean `answer`?"),
        ("rollouts", {"privileged_context": "answer"}, "has no effect with the maker rollouts"),
        ("rollouts", {"context_kwargs": {"column": "a"}}, "has no effect without `privileged_context`"),
        ("star", {"reward_funcs": "accuracy_reward"}, "missing a required argument: 'solution'"),
        ("star", {"reward_funcs": "nowhere.reward"}, "Cannot load the reward function 'nowhere.reward'"),
        ("stra", {}, "Did you mean `star`?"),
        ("star", {"maker_kwargs": {"keep": "all"}}, "do not fit `maker='star'`"),
        ("star", {"dataset_name": None}, "set `dataset_name`"),
        ("star", {"dataset_name": "nowhere.jsonl"}, "There is no file or folder nowhere.jsonl"),
        ("star", {"output_dir": None}, "set `output_dir`"),
        ("star", {"model_name_or_path": None}, "set `model_name_or_path`"),
        ("star", {"limit": 0}, "`limit` must be at least 1"),
        ("star", {"temperature": -1.0}, "`temperature` must be at least 0"),
        ("star", {"num_sample": 3}, "Unknown field: `num_sample`"),
        ("mixsd", {"reward_funcs": None}, "The maker mixsd has to tell right from wrong. Set `reward_funcs`."),
        ("mixsd", {"privileged_context": None}, "The maker mixsd shows the model a hint"),
        ("mixsd", {"maker_kwargs": {"share": 2}}, "`share` of the mixsd maker must be in [0, 1], got 2"),
        ("pbsd", {"privileged_context": None}, "The maker pbsd shows the model a hint"),
        ("pbsd", {"teacher": {"model_name_or_path": "m"}}, "`teacher` has no effect with the maker pbsd"),
        ("tessy", {"privileged_context": None}, "has two writers. Set `teacher` to a second model"),
        ("tessy", {"maker_kwargs": None}, "do not fit `maker='tessy'`"),
        ("tessy", {"maker_kwargs": {"boundary": "nowhere.f"}}, "Cannot load `boundary='nowhere.f'`"),
        ("tessy", {"teacher": {"model_name": "m"}}, "has no field `model_name`. Did you mean `model_name_or_path`?"),
        ("tessy", {"teacher": {"backend": "transformers"}}, "Of `teacher`: No model: set `model_name_or_path`"),
        ("tessy", {"teacher": "m"}, "Expected `teacher` to be a mapping"),
    ],
)
def test_bad_input_is_told_before_the_model_is_loaded(generate, monkeypatch, capsys, maker, fields, message):
    monkeypatch.setattr(loading, "load_backend", lambda *args, **kwargs: pytest.fail("loaded the model"))
    assert generate(maker, **fields) == 2
    error = capsys.readouterr().err
    assert "trl-opsd generate: error: " in error
    assert message in error
    assert not Path("run").exists()


def test_a_row_without_the_column_of_the_context(generate, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_backend", lambda *args, **kwargs: pytest.fail("loaded the model"))
    rows = lines(tmp_path / "rows.jsonl")
    rows[5]["answer"] = " "
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert generate("star") == 2
    assert "rows.jsonl, row 5: `answer` is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("maker", "fields", "name"),
    [
        ("star", {"temperature": 0.7}, "temperature` was 1.0 and is 0.7"),
        ("star", {"seed": 1}, "seed` was 0 and is 1"),
        ("star", {"context_kwargs": {"template": "{prompt} {answer}"}}, "context_kwargs` was None and is"),
        ("rollouts", {}, "maker` was 'star' and is 'rollouts'"),
        ("mixsd", {}, "maker` was 'star' and is 'mixsd'"),
    ],
)
def test_a_folder_of_other_settings_is_refused(generate, capsys, maker, fields, name):
    assert generate("star", "--limit", "1", success_threshold=0.0) == 0
    before = Path("run/data/train.jsonl").read_bytes()
    assert generate(maker, "--limit", "1", **fields) == 2
    error = capsys.readouterr().err
    assert name in error
    assert "Choose another `output_dir`" in error
    assert Path("run/data/train.jsonl").read_bytes() == before


def test_other_weights_of_the_same_name_are_refused(generate, model_path, tmp_path, capsys):
    shutil.copytree(model_path, tmp_path / "model")
    fields = {"model_name_or_path": "model", "success_threshold": 0.0}
    assert generate("rollouts", "--limit", "1", maker_kwargs={"keep": "all"}, **fields) == 0
    (tmp_path / "model" / "model.safetensors").touch()
    assert generate("rollouts", "--limit", "1", maker_kwargs={"keep": "all"}, **fields) == 2
    assert "`weights` was" in capsys.readouterr().err


def test_a_server_with_other_weights_is_refused(generate, model_path, monkeypatch, capsys):
    class Served(TransformersBackend):
        root = "runs/checkpoint-100"

    def load(kind, name, tokenizer, **kwargs):
        assert (kind, name) == ("vllm_server", "policy")
        return Served(AutoModelForCausalLM.from_pretrained(model_path), [tokenizer.eos_token_id], 2)

    monkeypatch.setattr(loading, "load_backend", load)
    fields = {"backend": "vllm_server", "model_name_or_path": "policy", "tokenizer": model_path, "limit": 1}
    assert generate("rollouts", maker_kwargs={"keep": "all"}, **fields) == 0
    assert lines("run/data/train.jsonl")[0]["model"] == "policy"
    Served.root = "runs/checkpoint-200"
    assert generate("rollouts", maker_kwargs={"keep": "all"}, **fields) == 2
    assert "`weights` was 'runs/checkpoint-100' and is 'runs/checkpoint-200'" in capsys.readouterr().err


def test_a_folder_that_is_worked_in_or_unknown_is_refused(generate, capsys):
    with locked(Path("run")):
        assert generate("star") == 2
    assert "Another run works in run" in capsys.readouterr().err
    Path("run/completions.jsonl").write_text('{"row": 0}\n')
    assert generate("star") == 2
    assert "run.json does not say how" in capsys.readouterr().err


def test_nothing_that_is_worth_keeping_is_an_error(generate, capsys):
    assert generate("star", "--limit", "2") in (0, 2)
    assert generate("star", "--limit", "2", success_threshold=9.0) == 2
    assert "Nothing of 2 rows is worth keeping (" in capsys.readouterr().err
    assert not Path("run/data").exists()


@pytest.mark.parametrize("args", [[], ["--config", "recipe.yaml"]])
def test_a_maker_has_to_be_named(args, capsys):
    assert cli.main(["generate", *args]) == 2
    assert "Name the maker before all flags" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--help"], ["star", "--help"]])
def test_help(args, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["generate", *args])
    assert "The maker is one of rollouts, star, mixsd, pbsd, tessy" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_shipped_recipe_makes_data(generate, model_path, tmp_path, recipe):
    values, is_small = yaml.safe_load(recipe.read_text()), recipe.parent.name == "playground"
    maker = recipe.stem.removeprefix("generate-") if is_small else recipe.parent.name
    assert f"generate {maker} --config {recipe.relative_to(ROOT)}" in recipe.read_text()
    (arguments,) = make_parser().parse_args_and_config(["--config", str(recipe)])
    parsed = values.keys() - {"reward_funcs", "column_mapping"}
    assert all(getattr(arguments, name) == values[name] for name in parsed)
    rows = [{**row, "solution": row["answer"]} for row in lines("rows.jsonl")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"model_name_or_path": model_path, "dataset_name": "rows.jsonl", "output_dir": "run", "limit": 2}
    if not is_small:  # data, rewards and a second model of one's own
        small |= dict.fromkeys(("dataset_config", "column_mapping", "prompt_template"))
        small |= {"backend": "transformers", "reward_funcs": "rewards_of_test_generate.even", "temperature": 1.0}
        small |= {"teacher": {"model_name_or_path": model_path, "backend": "transformers"}} if maker == "tessy" else {}
    if maker == "tessy":  # what the tiny model says ends early, in no box
        spoken = {"end_of_thinking": "e", "answer_tokens": 150, "max_tries": 9}
        spoken |= {} if "teacher" not in small else {"boundary": "rewards_of_test_generate.vowels"}
        small["maker_kwargs"] = {**values["maker_kwargs"], **spoken, "student_opening": "", "teacher_opening": None}
    assert generate(maker, **{**values, **small, "success_threshold": 0.0, "max_new_tokens": 200}) == 0


def test_there_is_a_recipe_of_every_maker():
    small = {path.stem for path in RECIPES if path.parent.name == "playground"}
    assert small == {f"generate-{maker}" for maker in ALL_MAKERS}
