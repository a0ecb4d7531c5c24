import json
import resource
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch
import yaml
from eval.made import make_sample
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from trl_opsd import cli
from trl_opsd.eval import run_folder, scorer
from trl_opsd.eval.arguments import EvalArguments
from trl_opsd.eval.run_folder import read_samples
from trl_opsd.eval.samples import Sample
from trl_opsd.eval.scorer import Verdict
from trl_opsd.files import locked
from trl_opsd.sampling import loading
from trl_opsd.sampling.transformers import TransformersBackend
from trl_opsd.scripts import eval as command


pytestmark = pytest.mark.needs("math_verify", "matplotlib")

QUICK = ["--num_samples", "2", "--max_new_tokens", "6", "--limit", "3", "--batch_size", "2"]


@pytest.fixture
def run(model_path, tmp_path):
    """Runs the command on the embedded world into tmp_path/run, and returns its exit status."""

    def run(*args, benchmark="playground_opsdc", model=model_path, output_dir=tmp_path / "run"):
        fixed = ["--model_name_or_path", model, "--backend", "transformers", "--output_dir", str(output_dir)]
        problems = [] if benchmark is None else ["--benchmarks", benchmark]
        return cli.main(["eval", *fixed, *problems, *QUICK, *args])

    return run


def samples(folder, benchmark="playground_opsdc"):
    found = read_samples(folder / benchmark / "samples.jsonl")
    return sorted(found, key=lambda sample: (sample.problem_id, sample.sample_index))


@contextmanager
def files_of(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_embedded_world_end_to_end(run, tmp_path, capsys, drawn):
    assert run() == 0

    found = samples(tmp_path / "run")
    assert [sample.sample_index for sample in found] == [0, 1] * 3
    assert len({sample.seed for sample in found}) == 6
    assert all(1 <= sample.num_tokens <= 6 for sample in found)
    problems = [json.loads(line) for line in (tmp_path / "run/playground_opsdc/problems.jsonl").open()]
    assert {problem["reference"] for problem in problems} == {sample.reference for sample in found}
    for problem in problems:
        assert problem["prompt"].startswith("<|im_start|>user\n")
        assert problem["prompt"].endswith("=?<|im_end|>\n<|im_start|>assistant\n")
    table = pyarrow.parquet.read_table(tmp_path / "run/playground_opsdc/samples.parquet")
    rows = [Sample(**row) for row in table.to_pylist()]
    assert sorted(rows, key=lambda sample: (sample.problem_id, sample.sample_index)) == found
    metrics = json.loads((tmp_path / "run/playground_opsdc/metrics.json").read_text())
    assert metrics["summary"]["num_samples"] == 6
    assert metrics["ungradable"] == {}
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["settings"]["max_new_tokens"] == 6
    assert record["settings"]["scorer_version"]
    assert "torch" in record["versions"]
    assert "avg@k" in capsys.readouterr().out
    assert "avg@k" in (tmp_path / "run/summary.md").read_text()
    for name in ("accuracy", "lengths"):
        assert (tmp_path / f"run/playground_opsdc/{name}.png").read_bytes().startswith(b"\x89PNG")
    accuracy, lengths = (
        drawn[tmp_path / f"run/playground_opsdc/{name}.png"].axes[0] for name in ("accuracy", "lengths")
    )
    assert [line.get_label() for line in accuracy.lines] == ["run"]
    assert accuracy.get_ylabel() == "right within the budget (%)"
    assert lengths.lines[0].get_xdata()[0] == sum(sample.num_tokens for sample in found) / len(found)


def test_a_finished_run_is_only_summed_up_and_a_larger_one_goes_on(run, tmp_path, monkeypatch):
    assert run() == 0
    before = samples(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_backend", lambda *args, **kwargs: pytest.fail("loaded a model for nothing"))
        assert run("--batch_size", "5") == 0
        assert run("--num_samples", "1") == 0
    summary = json.loads((tmp_path / "run/playground_opsdc/metrics.json").read_text())["summary"]
    assert summary["num_samples"] == 3

    assert run("--num_samples", "3", "--limit", "4") == 0

    after = samples(tmp_path / "run")
    assert len(after) == 12
    assert set(before) < set(after)


def test_another_version_of_the_scorer_grades_anew_and_generates_nothing(run, tmp_path, monkeypatch, capsys):
    assert run() == 0
    assert run(benchmark="playground_opsd") == 0  # one that the next command does not name
    folder, names = tmp_path / "run", ("playground_opsd", "playground_opsdc")
    files = [folder / "run.json", *(folder / name / "samples.jsonl" for name in names)]
    before, old = [file.read_bytes() for file in files], {name: samples(folder, name) for name in names}
    graded = []

    def score(completion, reference, answer_type):
        graded.append(completion)
        if len(graded) == 10:  # of 12
            raise KeyboardInterrupt
        return Verdict(True, f"{answer_type} {reference}", "bare", None)

    monkeypatch.setattr(run_folder, "score", score)
    monkeypatch.setattr(scorer, "SCORER_VERSION", "next")
    monkeypatch.setattr(loading, "load_backend", None)  # nothing is loaded
    assert run() == 130
    assert [file.read_bytes() for file in files] == before

    assert run() == 0
    assert "playground_opsdc: the scorer has changed" in capsys.readouterr().out
    assert len(graded) == 10 + 12
    for name in names:
        assert samples(folder, name) == [
            replace(sample, correct=True, answer=f"math {sample.reference}", answer_format="bare", error=None)
            for sample in old[name]
        ]
    assert json.loads(files[0].read_text())["settings"]["scorer_version"] == "next"
    assert json.loads((folder / "playground_opsdc/metrics.json").read_text())["summary"]["avg_at_k"]["value"] == 1
    assert not (folder / "playground_opsd/metrics.json").exists()  # it would tell the old verdicts

    assert run() == 0
    assert len(graded) == 10 + 12
    assert run("--seed", "1") == 2


def test_another_run_in_the_same_folder_is_refused(run, tmp_path, capsys):
    with locked(tmp_path / "run"):
        assert run("--overwrite") == 2
    assert f"Another run works in {tmp_path / 'run'}" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


def test_an_interrupted_run_goes_on(run, tmp_path, monkeypatch, capsys):
    assert run(output_dir=tmp_path / "whole") == 0
    load = loading.load_backend

    def load_one_that_is_stopped(*args, **kwargs):
        backend = load(*args, **kwargs)
        generate = backend.generate

        def stopped(requests, sampling):
            for count, result in enumerate(generate(requests, sampling)):
                if count == 3:
                    raise KeyboardInterrupt
                yield result

        backend.generate = stopped
        return backend

    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_backend", load_one_that_is_stopped)
        assert run() == 130
    assert "the same command goes on" in capsys.readouterr().err
    file = tmp_path / "run/playground_opsdc/samples.jsonl"
    first = file.read_bytes()
    assert first.count(b"\n") == 3
    file.write_bytes(first + b'{"benchmark": "playgr')  # killed while it wrote

    assert run() == 0
    assert file.read_bytes().startswith(first)
    assert samples(tmp_path / "run") == samples(tmp_path / "whole")


def test_a_full_disk_is_one_error_and_the_run_goes_on(run, tmp_path, capsys):
    assert run(output_dir=tmp_path / "whole") == 0
    # The settings and the problems fit, and the samples only in part
    assert run("--num_samples", "1") == 0
    capsys.readouterr()
    with files_of(2048):
        assert run("--num_samples", "40") == 2
    error = capsys.readouterr().err
    assert error.count("trl-opsd eval: error: Cannot write a sample of playground_opsdc") == 1
    kept = samples(tmp_path / "run")
    assert f"The {len(kept)} samples before it are kept" in error
    assert 3 < len(kept) < 40

    assert run() == 0
    assert set(samples(tmp_path / "whole")) <= set(samples(tmp_path / "run"))


def test_other_settings_and_other_weights_are_refused(run, tmp_path, model_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(model_path, model)
    assert run(model=str(model)) == 0
    before = samples(tmp_path / "run")

    assert run("--temperature", "0.5", model=str(model)) == 2
    assert "temperature was 1.0 and is 0.5" in capsys.readouterr().err
    # What does not change a completion does not count
    (model / "README.md").write_text("A model.")
    assert run("--model_init_kwargs", "{gpu_memory_utilization: 0.5}", model=str(model)) == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["other_fields"]["model_init_kwargs"] == {"gpu_memory_utilization": 0.5}
    assert run("--model_init_kwargs", "{max_model_len: 99}", model=str(model)) == 2
    assert "model_init_kwargs was None and is {'max_model_len': 99}" in capsys.readouterr().err
    make_model(make_tokenizer(), seed=1).save_pretrained(model)
    assert run(model=str(model)) == 2
    assert "weights was " in capsys.readouterr().err
    assert samples(tmp_path / "run") == before

    assert run("--overwrite", model=str(model)) == 0
    assert not {sample.completion for sample in samples(tmp_path / "run")} & {sample.completion for sample in before}


def test_other_problems_are_refused(run, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    own = [
        "--dataset_name",
        str(data),
        "--question_column",
        "problem",
        "--answer_column",
        "gold",
        "--answer_type",
        "text",
    ]
    data.write_text(json.dumps({"problem": "1+1?", "gold": "two"}) + "\n")
    assert run(*own, benchmark=None) == 0
    data.write_text(json.dumps({"problem": "1+1?", "gold": "three"}) + "\n")

    assert run(*own, benchmark=None) == 2
    assert "`reference` was 'two' and is 'three'" in capsys.readouterr().err
    # Another chat template asks another question
    data.write_text(json.dumps({"problem": "1+1?", "gold": "two"}) + "\n")
    (tmp_path / "template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert run(*own, "--chat_template_path", str(tmp_path / "template.jinja"), benchmark=None) == 2
    assert "`prompt` was " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset_name", "name"),
    [("org/data-v1.5", "data-v1.5"), ("a/rows.v2.jsonl", "rows.v2"), (".", "here"), ("..", "above")],
)
def test_problems_of_your_own_are_called_like_their_source(dataset_name, name, tmp_path, monkeypatch):
    (tmp_path / "above/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above/here")
    (benchmark,) = command._benchmarks(EvalArguments(model_name_or_path="m", dataset_name=dataset_name))
    assert benchmark.name == name


def test_references_that_cannot_be_read_are_listed(run, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "1+1?", "answer": "2"}\n{"question": "What?", "answer": "@@ ??"}\n')

    assert run("--dataset_name", str(data), benchmark=None) == 0

    (problem_id,) = {sample.problem_id for sample in samples(tmp_path / "run", "rows") if sample.correct is None}
    metrics = json.loads((tmp_path / "run/rows/metrics.json").read_text())
    assert metrics["ungradable"] == {problem_id: "@@ ??"}
    assert metrics["summary"]["num_ungraded"] == 2
    assert "cannot be read" in capsys.readouterr().out


def test_several_benchmarks_and_a_recipe_file(run, tmp_path):
    recipe = tmp_path / "eval.yaml"
    recipe.write_text(yaml.safe_dump({"benchmarks": ["playground_opsd", "playground_opsdc"], "system_prompt": "Add."}))

    assert run("--config", str(recipe), benchmark=None) == 0

    for benchmark in ("playground_opsd", "playground_opsdc"):
        assert len(samples(tmp_path / "run", benchmark)) == 6
    problem = json.loads((tmp_path / "run/playground_opsd/problems.jsonl").read_text().splitlines()[0])
    assert problem["prompt"].startswith("<|im_start|>system\nAdd.")


def test_an_adapter_is_applied(run, tmp_path, model_path):
    adapted = get_peft_model(
        make_model(make_tokenizer()), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    make_tokenizer().save_pretrained(tmp_path / "merged")
    greedy = ["--temperature", "0", "--num_samples", "1"]

    assert run(*greedy, output_dir=tmp_path / "base") == 0
    assert run(*greedy, "--adapter", str(tmp_path / "adapter")) == 0
    assert run(*greedy, model=str(tmp_path / "merged"), output_dir=tmp_path / "all") == 0

    assert samples(tmp_path / "run") == samples(tmp_path / "all")
    assert samples(tmp_path / "run") != samples(tmp_path / "base")


def test_a_model_without_chat_template(run, tmp_path, model_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(model_path, model)
    (model / "chat_template.jinja").unlink()

    assert run(model=str(model)) == 2
    assert "no chat template" in capsys.readouterr().err
    assert run("--apply_chat_template", "false", model=str(model)) == 0


def test_what_is_too_long_is_refused_before_anything_is_generated(run, tmp_path, capsys):
    assert run("--max_new_tokens", "4090") == 2

    assert "Lower `max_new_tokens` to at most" in capsys.readouterr().err
    assert samples(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--benchmarks", "aime42"], "There is no benchmark 'aime42'"),
        (["--benchmarks", "playground_opsd", "playground_opsd"], "`benchmarks` names one twice"),
        (["--dataset_name", "rows.jsonl"], "either `benchmarks`"),
        (["--temprature", "1"], "Did you mean `--temperature`?"),
        (["--num_processes", "8"], "`accelerate launch`. It has no meaning here: transformers runs in one process"),
        (["--chat_template_path", "nowhere.jinja"], "nowhere.jinja"),
        (["--backend", "vllm_server", "--base_url", "http://127.0.0.1:9", "--adapter", "a"], "`--lora-modules`"),
        (
            ["--backend", "vllm_server", "--tokenizer", "/nowhere"],
            "the tokenizer is elsewhere, set `tokenizer`",
        ),
    ],
)
def test_errors_are_one_line(args, message, run, capsys):
    assert run(*args) == 2

    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("trl-opsd eval: error: ")
    assert message in error


def test_references_that_cannot_be_read_at_all(run, tmp_path, capsys, monkeypatch):
    rows = [{"question": f"{n}+1?", "answer": f"We add one to {n}, which makes {n + 1}."} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(loading, "load_backend", None)  # nothing is loaded

    assert run("--dataset_name", str(tmp_path / "rows.jsonl"), benchmark=None) == 2
    error = capsys.readouterr().err
    assert "No reference answer of rows can be read" in error
    assert "`answer_column`" in error


def test_weights_on_the_hub_are_told_apart_by_their_commit(monkeypatch):
    asked = []

    def download(name, file, revision):
        asked.append((name, file, revision))
        return f"/cache/snapshots/{name[-1]}1/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    arguments = EvalArguments(
        model_name_or_path="org/a", adapter="org/b", revision="main", benchmarks=["playground_opsd"]
    )
    assert [arguments.fingerprint(name) for name in ("org/a", "org/b")] == ["a1", "b1"]
    assert asked == [("org/a", "config.json", "main"), ("org/b", "adapter_config.json", None)]


def test_a_server_with_other_weights_of_the_same_name_is_refused(run, tmp_path, monkeypatch, model_path, capsys):
    class Served(TransformersBackend):
        root = "runs/checkpoint-100"

    def load(kind, name, tokenizer, **kwargs):
        model = AutoModelForCausalLM.from_pretrained(model_path)
        return Served(model, [tokenizer.eos_token_id], 2)

    monkeypatch.setattr(loading, "load_backend", load)
    server = ["--backend", "vllm_server", "--model_name_or_path", "policy", "--tokenizer", model_path]
    assert run(*server) == 0
    assert "The server loaded policy from runs/checkpoint-100." in capsys.readouterr().out
    Served.root = "runs/checkpoint-200"
    assert run(*server) == 2
    assert "weights was 'runs/checkpoint-100' and is 'runs/checkpoint-200'" in capsys.readouterr().err


def test_matplotlib_that_is_not_there(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trl_opsd.report.plots.find_spec", lambda name: None)
    assert run() == 2
    assert "pip install 'trl-opsd[eval]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_engine_that_fails_is_one_line(run, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError(f"CUDA out of memory.\n{'Tried to allocate. ' * 99}")

    monkeypatch.setattr(loading, "load_backend", fail)
    assert run() == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("trl-opsd eval: error: OutOfMemoryError: CUDA out of memory. Tried to")
    assert "All finished samples are kept" in line
    assert len(line) < 700


def test_the_time_left_is_by_the_pace_so_far(monkeypatch):
    shown = []
    clock = iter([0, 60, 120, 480])
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("rich.progress.Progress.update", lambda progress, task, advance, left: shown.append(left))
    file = SimpleNamespace(append=lambda sample: None)
    command._write([make_sample()] * 3, {"made-up": file}, num_wanted=10, num_done=4)
    assert shown == ["0:05:00", "0:04:00", "0:08:00"]


def test_an_adapter_is_handed_to_vllm(tmp_path, model_path, monkeypatch):
    given = {}

    class LLM:
        llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=99))

        def __init__(self, **kwargs):
            given.update(kwargs)

    for name, module in {
        "vllm": SimpleNamespace(LLM=LLM),
        "vllm.lora": SimpleNamespace(),
        "vllm.lora.request": SimpleNamespace(LoRARequest=lambda *args: args),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    adapter = str(tmp_path / "adapter")
    LoraConfig(r=20).save_pretrained(adapter)
    init = {"tensor_parallel_size": 2}

    backend = loading.load_backend("vllm", model_path, make_tokenizer(), adapter=adapter, model_init_kwargs=init)

    assert (given["model"], given["dtype"], given["tensor_parallel_size"]) == (model_path, torch.float32, 2)
    assert (given["enable_lora"], given["max_lora_rank"]) == (True, 32)
    assert backend._lora_request == ("adapter", 1, adapter)


def test_vllm_that_is_not_there(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)

    assert run("--backend", "vllm") == 2
    assert "vLLM cannot be imported" in capsys.readouterr().err


def test_list(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    assert cli.main(["eval", "--list"]) == 0

    output = capsys.readouterr().out
    for word in ("aime24", "MathArena/aime_2025", "Idavidrein/gpqa gpqa_diamond", "CC BY-NC-SA 4.0"):
        assert word in output


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])

    output = capsys.readouterr().out
    assert output.startswith("usage: trl-opsd eval --model_name_or_path")
    for action in command.make_parser()._actions:
        assert action.help, action.dest
    text = " ".join(output.split())
    assert "Sets `apply_chat_template` to false. --system_prompt" in text
    assert "goes on where it stopped when it is started again with the same flags" in text
