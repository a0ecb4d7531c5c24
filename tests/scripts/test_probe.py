"""`trl-opsd probe`, with a tiny model."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny import make_model

from trl_opsd import SelfDistillationTrainer, cli, score
from trl_opsd.files import locked, recipes_folder
from trl_opsd.methods import TRAINABLE
from trl_opsd.probe import measure
from trl_opsd.scripts.probe import method_of


pytest.importorskip("math_verify")
pytest.importorskip("matplotlib")


def write_rows(path, number=16, **columns):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{n}+{n}=?"}],
            "solution": f"Take {n} and {n}.\nThen they are {2 * n}.",
            "answer": str(2 * n),
            **columns,
        }
        for n in range(1, number + 1)
    ]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture
def probe(model_path, tmp_path, monkeypatch):
    """Runs the command on a recipe of the playground, and returns its exit status."""
    monkeypatch.chdir(tmp_path)
    write_rows("rows.jsonl")

    def run(*args, recipe="opsd", **fields):
        settings = yaml.safe_load((recipes_folder() / "playground" / f"{recipe}.yaml").read_text())
        settings |= {
            "model_name_or_path": model_path,
            "dataset_name": "rows.jsonl",
            "max_completion_length": 8,
            "per_device_eval_batch_size": 4,
            "per_device_train_batch_size": 8,
            "disable_tqdm": True,
            # On both sides, or the teacher would begin with a thought
            "chat_template_kwargs": {"enable_thinking": True},
            **fields,
        }
        Path(f"{recipe}.yaml").write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
        return cli.main(["probe", "--config", f"{recipe}.yaml", "--probe_dir", "run", "--rows", "10", *args])

    return run


def result():
    return json.loads(Path("run/probe.json").read_text())


def written():
    return measure.read_records(Path("run/records.jsonl"))


@pytest.fixture
def answers(monkeypatch, tokenizer):
    """Has the model write what a function makes of the text of its prompt and of how often it was asked."""

    def answer(write):
        asked = []

        def sample(self, prompt_ids, sampling, stream=0):
            asked.append(stream)
            texts = [tokenizer.decode(ids) for ids in prompt_ids]
            return [tokenizer(write(text))["input_ids"] + [tokenizer.eos_token_id] for text in texts]

        monkeypatch.setattr(SelfDistillationTrainer, "sample", sample)
        return asked

    return answer


def copying(prompt):
    """Repeats the number that the solution ends with, or knows nothing."""
    return f"\\boxed{{{prompt.rpartition('they are ')[2].partition('.')[0]}}}" if "they are" in prompt else "7 ?"


def test_the_command_on_a_recipe_of_the_playground(probe, capsys):
    assert probe() == 0
    said = result()
    assert said["num_rows"] == 10
    assert set(said["arms"]) == {"student", "teacher", "none", "other_solution", "shuffled_solution"}
    assert said["missing"] == {}
    assert said["verdict"]["conclusion"] == "undecided"
    assert said["settings"]["method"] == "opsd"
    out = capsys.readouterr().out
    assert "10 rows of the split `train`" in out
    assert "Undecided: too few rows." in out
    assert out.count("teacher") >= 2
    page = Path("run/index.html").read_text()
    assert "Undecided: too few rows." in page
    assert "<svg" in page
    records = written()
    assert len(records) == 50
    assert not {"train", "test"} & {path.name for path in Path("run").iterdir()}


def test_figures_are_those_of_score(probe, monkeypatch):
    trainers = []
    own = measure.Measuring.__init__
    monkeypatch.setattr(
        measure.Measuring,
        "__init__",
        lambda self, trainer, *args: (trainers.append(trainer), own(self, trainer, *args))[1],
    )
    assert probe() == 0
    [trainer] = trainers
    rows = {row["answer"]: row for row in trainer.train_dataset}
    by_key = {(record["row"], record["arm"]): record for record in written()}
    divergences, gaps, controls = [], [], []
    for number in range(10):
        student, teacher = by_key[number, "student"], by_key[number, "teacher"]
        # The row by what its teacher read
        [row] = [row for row in rows.values() if row["solution"] in teacher["read"]]
        ids = student["completions"][0]["token_ids"]
        scores = score(trainer, [row], [ids]).scores
        for name in measure.SCORES:
            expected = getattr(scores, name)[0].tolist()
            assert teacher["scores"][0][name] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        divergences += scores.divergence[0].tolist()
        gaps += (scores.teacher_entropy - scores.student_entropy)[0].tolist()
        controls += by_key[number, "other_solution"]["scores"][0]["divergence"]
        assert max(by_key[number, "none"]["scores"][0]["divergence"]) < 1e-5
    found = result()["divergence"]
    assert found["divergence"]["value"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)
    assert found["entropy_gap"]["value"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-3)
    assert found["controls"]["other_solution"] == pytest.approx(sum(controls) / len(controls), rel=1e-3)
    assert found["remaining"]["other_solution"]["value"] == pytest.approx(sum(controls) / sum(divergences), rel=1e-3)


def test_a_copying_teacher(probe, answers, capsys):
    answers(copying)
    assert probe("--max_completion_length", "20") == 0
    said = result()
    assert said["verdict"]["conclusion"] == "copies"
    assert said["differences"]["teacher"]["accuracy"]["value"] == 1.0
    assert said["arms"]["other_solution"]["accuracy"]["value"] == 0.0
    assert said["copying"]["follows_other"]["value"] == 1.0
    assert "The teacher copies." in capsys.readouterr().out


@pytest.mark.parametrize("after", [1, 4, 7])
def test_an_interrupted_probe_goes_on_and_ends_like_one_that_was_not(probe, monkeypatch, capsys, after):
    assert probe("--probe_dir", "whole") == 0
    whole = Path("whole/records.jsonl").read_text()
    own, asked = SelfDistillationTrainer.sample, []

    def interrupted(self, *args):
        asked.append(args)
        if len(asked) == after:
            raise KeyboardInterrupt
        return own(self, *args)

    monkeypatch.setattr(SelfDistillationTrainer, "sample", interrupted)
    assert probe() == 130
    assert "All that was measured is kept" in capsys.readouterr().err
    kept = len(Path("run/records.jsonl").read_text().splitlines())
    assert kept == 4 * (after - 1)
    asked.clear()
    monkeypatch.setattr(SelfDistillationTrainer, "sample", own)
    assert probe() == 0
    assert Path("run/records.jsonl").read_text() == whole
    assert result()["verdict"] == json.loads(Path("whole/probe.json").read_text())["verdict"]


def test_an_interrupted_probe_says_what_its_rows_say(probe, answers, monkeypatch, capsys):
    asked = answers(copying)
    sample = SelfDistillationTrainer.sample

    def interrupted(self, *args):
        if len(asked) == 10:
            raise KeyboardInterrupt
        return sample(self, *args)

    monkeypatch.setattr(SelfDistillationTrainer, "sample", interrupted)
    assert probe("--max_completion_length", "20") == 130
    assert result()["num_rows"] == 8
    assert "8 of 10 rows" in capsys.readouterr().out
    assert Path("run/index.html").exists()


def test_a_folder_of_other_settings_is_refused(probe, capsys):
    assert probe() == 0
    assert probe("--temperature", "0.5") == 2
    assert "`temperature` was 1.0 and is 0.5" in capsys.readouterr().err
    with locked(Path("run")):
        assert probe() == 2
    assert "Another run works in run" in capsys.readouterr().err


def test_an_engine_that_has_no_room_for_the_teachers_answer_is_refused(probe, answers, monkeypatch, capsys):
    answers(copying)
    own = measure.Measuring.__init__

    def with_engine(self, trainer, *args):
        own(self, trainer, *args)
        trainer.args.use_vllm, trainer.context_length = True, 40

    monkeypatch.setattr(measure.Measuring, "__init__", with_engine)
    assert probe() == 2

    assert "tokens, and vLLM takes 40: raise `vllm_max_model_length` to that" in capsys.readouterr().err
    assert {record["arm"] for record in written()} == {"student"}


def test_contexts_that_read_rollouts_read_those_of_the_student(probe, answers, monkeypatch):
    turn = iter(range(1000))

    def write(prompt):
        return f"\\boxed{{{2 * int(prompt.split('+')[0].rpartition(chr(10))[2])}}}" if next(turn) % 2 else "7 ?"

    answers(write)
    assert probe("--max_completion_length", "20", recipe="sdpo") == 0
    said = result()
    assert set(said["missing"]) == {"other_solution", "shuffled_solution"}
    students = [record for record in written() if record["arm"] == "student"]
    assert {len(record["completions"]) for record in students} == {8}
    assert said["arms"]["student"]["accuracy"]["value"] == 0.5
    teachers = [record for record in written() if record["arm"] == "teacher"]
    assert all("\\boxed{" in record["read"] for record in teachers)
    assert all(any(record["scores"]) for record in teachers)


def test_what_a_method_lacks_is_said(probe, capsys):
    assert probe(recipe="cipo") == 0
    said = result()
    assert "divergence in the loss" in said["missing"]
    assert "shows no column" in said["missing"]["other_solution"]
    assert said["verdict"]["conclusion"] == "nothing_to_learn"
    assert "Not there: divergence in the loss" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["trace", "rlcsd", "purified_opsd"])
def test_methods_whose_parts_read_more(probe, recipe):
    assert probe(recipe=recipe) == 0
    assert result()["num_rows"] == 10


def question_of(read):
    return read.split("\n")[1]


def likeliest(tokenizer, read):
    """What the other model answers to the bare question of a prompt."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question_of(read)}], add_generation_prompt=True, return_dict=True
    )
    other = make_model(tokenizer, seed=1).eval()
    ids = torch.tensor([prompt["input_ids"]], device=other.device)
    return other.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.size(1) :].tolist()


def test_an_external_teacher_writes_itself(probe, tmp_path, tokenizer):
    make_model(tokenizer, seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    assert (
        probe(teacher="external", teacher_model_name_or_path="other", temperature=1e-4, distillation_temperature=1.0)
        == 0
    )
    by_key = {(record["row"], record["arm"]): record["completions"][0] for record in written()}
    assert any(by_key[row, "student"]["token_ids"] != by_key[row, "none"]["token_ids"] for row in range(10))
    read = next(record["read"] for record in written() if record["arm"] == "none" and record["row"] == 0)
    assert by_key[0, "none"]["token_ids"] == likeliest(tokenizer, read)


def test_each_rows_teacher_writes_and_scores(probe, tmp_path, tokenizer):
    make_model(tokenizer, seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    rows = [{**row, "domain": ("own", "other")[n % 2]} for n, row in enumerate(write_rows("rows.jsonl"))]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teachers = {"own": {"teacher": "initial"}}
    teachers["other"] = {"teacher": "external", "teacher_model_name_or_path": str(tmp_path / "other")}
    several = {"teacher": "several", "teachers": teachers, "teacher_column": "domain"}
    assert probe(**several, temperature=1e-4, distillation_temperature=1.0) == 0
    records = {(record["row"], record["arm"]): record for record in written()}
    domains = {row["prompt"][0]["content"]: row["domain"] for row in rows}
    found = []
    for number in range(10):
        bare, ids = records[number, "none"], records[number, "student"]["completions"][0]["token_ids"]
        found.append(domains[question_of(bare["read"])])
        is_own = found[-1] == "own"
        assert bare["completions"][0]["token_ids"] == (ids if is_own else likeliest(tokenizer, bare["read"]))
        assert (max(bare["scores"][0]["divergence"]) < 1e-5) == is_own
    assert set(found) == {"own", "other"}
    # Another choice of teachers is another measurement
    assert probe(**{**several, "teachers": {"own": teachers["own"], "other": {"teacher": "live"}}}) == 2


def test_rows_of_a_test_split(probe, capsys):
    Path("data").mkdir()
    write_rows("data/train.jsonl", 20)
    write_rows("data/test.jsonl", 9)
    assert probe(dataset_name="data") == 0
    assert "9 rows of the split `test`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("columns", "flags", "message"),
    [
        ({"solution": ""}, (), "`solution` is empty"),
        ({"answer": "a number that is neither a formula nor short"}, (), "Of 16 rows, 0 can be graded"),
        ({}, ("--answer_column", "truth"), "have no column `truth` to grade by"),
        ({}, ("--rows", "3"), "a probe takes at least 8"),
        ({}, ("--rows", "0"), "`rows` must be at least 1"),
        ({}, ("--teacher_server_base_url", "http://localhost:1"), "scores and does not write"),
        ({}, ("--dataset_test_split", "held_out"), "held_out"),
        ({}, ("--learning_rat", "1"), "Did you mean `--learning_rate`?"),
        ({}, ("--num_processes", "2"), "a probe runs in one process"),
    ],
)
def test_bad_input(probe, capsys, columns, flags, message):
    write_rows("rows.jsonl", **columns)
    fields = {}
    if "--teacher_server_base_url" in flags:
        fields = {"teacher": "external", "divergence_support": "sampled_token", "divergence": "reverse_kl"}
    assert probe(*flags, **fields) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_which_method_a_recipe_is_for(tmp_path):
    (tmp_path / "my.yaml").touch()
    assert method_of(["--config", "recipes/rlsd/qwen3-8b.yaml"]) == "rlsd"
    assert method_of(["--config=somewhere/sdpo.yaml"]) == "sdpo"
    assert method_of(["--config", "my.yaml", "--method", "opsdc"]) == "opsdc"
    for argv in ([], ["--config", str(tmp_path / "my.yaml")]):
        with pytest.raises(ValueError, match=r"`--method`, one of: opsd, "):
            method_of(argv)


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        cli.main(["probe", "--help"])
    out = capsys.readouterr().out
    for field in ("--rows", "--samples", "--answer_column", "--probe_dir", "--privileged_context", "--method"):
        assert field in out
    assert "distill" in TRAINABLE
