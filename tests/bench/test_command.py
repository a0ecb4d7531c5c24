import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trl_opsd import cli
from trl_opsd.bench import run as bench_run
from trl_opsd.bench.arguments import LossArguments, StepArguments
from trl_opsd.bench.command import _ended_in_order
from trl_opsd.bench.report import Report
from trl_opsd.bench.step import PARTS


Figure = pytest.importorskip("matplotlib.figure").Figure
LOSS = ["bench", "loss", "--num_tokens", "8", "--hidden_size", "4", "--vocab_size", "16", "--device", "cpu"]


def test_overview(capsys):
    assert cli.main(["bench"]) == 0
    output = capsys.readouterr().out
    assert "loss" in output
    assert "step" in output
    assert "teacher" in output


@pytest.mark.parametrize(
    ("name", "field"), [("loss", "--frozen_head"), ("step", "--teacher_prompt_tokens"), ("teacher", "--num_rollouts")]
)
def test_help_explains_fields_and_imports_nothing_heavy(name, field):
    code = f"""
import sys
from trl_opsd.cli import main
try:
    main(["bench", {name!r}, "--help"])
finally:
    heavy = {{"torch", "trl", "datasets", "accelerate", "rich", "matplotlib"}} & set(sys.modules)
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: trl-opsd bench {name}")
    assert field in done.stdout
    assert "Fewer than 5 give no" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["loss", "--contenders", "dense", "denes"],
            "`contenders` knows no 'denes'. Choose from: ours, ours-triton, ",
        ),
        (["loss", "--contenders", "dense", "dense"], "`contenders` names one twice"),
        (["loss", "--repeats", "0"], "`repeats` must be at least 1, got 0"),
        (["loss", "--warmups", "-1"], "`warmups` must be at least 0, got -1"),
        (["loss", "--num_tokens", "4", "0"], "`num_tokens` must be at least 1, got 0"),
        (["loss", "--vocab_size", "-3"], "`vocab_size` must be at least 1, got -3"),
        (["loss", "--threads", "0"], "`threads` must be at least 1, got 0"),
        (["loss", "--timeout", "0"], "`timeout` must be positive, got 0"),
        (["loss", "--clip", "0"], "`clip` must be positive"),
        (["loss", "--hidden_size", "wide"], "invalid int value: 'wide'"),
        (["loss", "--divergence", "kl"], "invalid choice: 'kl'"),
        (["loss", "--num_tokns", "3"], "unknown field `--num_tokns`. Did you mean `--num_tokens`?"),
        (["loss", "--output_dir", "{file}/results"], "cannot be written to (Not a directory). Name another folder."),
        (["step", "--num_rollouts", "0"], "`num_rollouts` must be at least 1, got 0"),
        (["step", "--num_generations", "3"], "`num_rollouts=4` must be a multiple of `num_generations=3`"),
        (["step", "--method", "opsd", "rlrtt"], "`method` knows no 'rlrtt'. Did you mean `rlrt`?"),
        (["step", "--preset", "qwen3-4b"], "invalid choice: 'qwen3-4b'"),
        (["step", "--use_vllm"], "samples the rollouts, which `sample=False` does without. Add `--sample`."),
        (["step", "--teacher_prompt_tokens", "64"], "must be more than `prompt_tokens=64`"),
    ],
)
def test_errors(args, message, capsys, monkeypatch, tmp_path):
    def start_nothing(*args, **kwargs):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", start_nothing)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()

    assert cli.main(["bench", *(arg.format(file=tmp_path / "file") for arg in args)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"trl-opsd bench {args[0]}: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_no_gpu(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["bench", "loss", "--device", "cuda", "--output_dir", str(tmp_path)]) == 2
    assert "`device=cuda` needs a GPU" in capsys.readouterr().err
    assert bench_run.find_device("auto") == "cpu"


def test_the_usual_contenders():
    assert LossArguments().contenders == ["ours", "ours-eager", "trl-chunked", "liger", "dense", "floor"]
    assert StepArguments().contenders == ["self-distillation", "sdft", "distillation"]
    with_groups = StepArguments(num_generations=2).contenders
    assert with_groups == ["self-distillation", "self-distillation+grpo", "sdft", "distillation"]
    assert StepArguments(contenders=["grpo"], method=["sdft"]).contenders == ["grpo", "method-sdft"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are written, by the name of their file."""
    figures = {}

    def savefig(figure, path, **kwargs):
        figures[Path(path).name] = figure

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    return figures


def test_loss(tmp_path, capsys, figures):
    args = ["--contenders", "ours", "ours-eager", "trl-chunked", "floor", "--clip", "1", "--check", "--repeats", "2"]
    assert cli.main([*LOSS, *args, "--vocab_size", "16", "32", "--output_dir", str(tmp_path)]) == 0

    output = capsys.readouterr().out
    assert "V = 16" in output
    assert "V = 32" in output
    assert "does not run here: it cannot clip" in output
    assert "no medians to quote" in output
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {
        "benchmark",
        "command",
        "started",
        "repeats",
        "warmups",
        "device",
        "versions",
        "cases",
    }
    assert results["command"].startswith("trl-opsd bench loss --num_tokens 8 ")
    assert results["device"]["type"] == "cpu"
    assert results["versions"]["torch"]
    case, other = results["cases"]
    assert case["case"]["num_tokens"] == 8
    assert case["case"]["dtype"] == "float32"
    assert (case["case"]["vocab_size"], other["case"]["vocab_size"]) == (16, 32)
    ours, eager, chunked, floor = case["contenders"]
    assert len(ours["samples"]) == len(eager["samples"]) == len(floor["samples"]) == 2
    assert ours["facts"]["gradient_error"] < 1e-4
    assert ours["facts"]["peak_extra_bytes"] >= 0
    assert ours["facts"]["kernel"] == eager["facts"]["kernel"] == "eager"
    assert ours["facts"]["first_seconds"] > 0
    assert "peak_extra_bytes" not in floor["facts"]
    assert chunked["samples"] == []
    assert case["order"] == ["ours", "ours-eager", "floor"] * 2
    lines = {line.get_label(): list(line.get_xdata()) for line in figures["plot.png"].axes[0].lines}
    assert lines == {"ours": [16, 32], "ours-eager": [16, 32], "floor": [16, 32]}


def step_of_fakes(monkeypatch, tmp_path, *args):
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
    monkeypatch.setattr(StepArguments, "factory", "fakes:serve")
    monkeypatch.setattr(StepArguments, "all_contenders", ("a", "squeezed", "greedy", "b"))
    completed = bench_run._completed
    journal = {"journal": str(tmp_path / "journal.txt")}
    monkeypatch.setattr(bench_run, "_completed", lambda *args: completed(*args) | journal)
    monkeypatch.setattr(bench_run, "REPORTS", {"step": Report(lambda result: "", lambda results: Figure())})
    assert cli.main(["bench", "step", "--device", "cpu", "--output_dir", str(tmp_path), "--repeats", "2", *args]) == 0
    [case] = json.loads((tmp_path / "results.json").read_text())["cases"]
    return case["order"], {row["contender"]: row for row in case["contenders"]}


def test_trainers_that_lacked_memory_beside_others_run_alone(monkeypatch, tmp_path, figures):
    order, rows = step_of_fakes(monkeypatch, tmp_path)
    together = ["a", "squeezed", "greedy", "b", "a", "squeezed", "b"]
    assert order == [*together, "squeezed", "squeezed", "greedy"]
    assert {name: row["alone"] for name, row in rows.items()} == {
        "a": False,
        "squeezed": True,
        "greedy": True,
        "b": False,
    }
    # Alone it has no more than there is
    assert rows["greedy"]["error"].startswith("failed after 1 timed iterations: OutOfMemoryError")


def test_one_after_the_other(monkeypatch, tmp_path, figures):
    order, rows = step_of_fakes(monkeypatch, tmp_path, "--sequential", "--contenders", "a", "b")
    assert order == ["a", "a", "b", "b"]
    assert all(row["alone"] for row in rows.values())
    commands = (tmp_path / "journal.txt").read_text().splitlines()
    assert [line.split()[1] for line in commands] == ["a"] * 8 + ["b"] * 8


def test_what_was_measured_is_written_while_it_runs(tmp_path, monkeypatch, figures):
    written = []

    def write(path, record, results):
        written.append([len(row.samples) for result in results for row in result.rows])

    monkeypatch.setattr(bench_run, "write_json", write)
    args = ["--contenders", "floor", "--repeats", "2", "--num_tokens", "8", "9", "--output_dir", str(tmp_path)]
    assert cli.main([*LOSS, *args]) == 0
    assert written == [[], [1], [2], [2], [2, 1], [2, 2], [2, 2]]


@pytest.mark.slow
def test_step(tmp_path, capsys, figures, device):
    args = ["--contenders", "self-distillation", "--repeats", "1", "--num_rollouts", "2", "--max_new_tokens", "4"]
    args += ["--prompt_tokens", "8", "--teacher_prompt_tokens", "16", "--device", device.type]
    assert cli.main(["bench", "step", *args, "--output_dir", str(tmp_path)]) == 0

    [case] = json.loads((tmp_path / "results.json").read_text())["cases"]
    [ours] = case["contenders"]
    assert ours["error"] is None
    assert ours["median"]["learning_seconds"] > 0
    assert case["case"]["model"] == str(tmp_path / "random-tiny")
    assert case["case"]["random_weights"]
    assert [container.get_label() for container in figures["plot.png"].axes[0].containers] == list(PARTS)


@pytest.mark.slow
def test_teacher(tmp_path, figures):
    args = ["--num_rollouts", "2", "--teacher_prompt_tokens", "16", "--max_new_tokens", "4", "--repeats", "1"]
    assert cli.main(["bench", "teacher", *args, "--device", "cpu", "--output_dir", str(tmp_path)]) == 0
    [case] = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert [row["error"] for row in case["contenders"]] == [None, None]
    assert len(figures["plot.png"].axes[0].containers[0]) == 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_case_is_completed_by_the_device(device, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(bench_run, "save_model", lambda *args: saved.append(args))
    arguments = StepArguments(preset="qwen3-0.6b", sample=True, use_vllm=device == "cuda")
    case = bench_run._completed(arguments.cases()[0], arguments, tmp_path, device)
    assert case["dtype"] == {"cpu": "float32", "cuda": "bfloat16"}[device]
    assert json.loads((tmp_path / "random-qwen3-0.6b" / "config.json").read_text())["hidden_size"] == 1024
    # An engine loads weights itself; else nobody writes any
    assert case["random_weights"] == (not saved) == (device == "cpu")
    loaded = StepArguments(model="org/model")
    case = bench_run._completed(loaded.cases()[0], loaded, tmp_path, device)
    assert case["model"] == "org/model"
    assert not case["random_weights"]


def test_no_contender_at_all(tmp_path, capsys):
    args = ["--contenders", "trl-chunked", "--clip", "1", "--output_dir", str(tmp_path)]
    assert cli.main([*LOSS, *args]) == 1
    assert "No contender could be measured" in capsys.readouterr().out


def test_a_request_to_end_is_an_interruption():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _ended_in_order():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_interrupted(tmp_path):
    for name in ("results.json", "plot.png"):
        (tmp_path / name).write_text("of an earlier run")
    args = ["--contenders", "floor", "--repeats", "1000000", "--output_dir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "trl_opsd.cli", *LOSS, *args],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Of a shell's background job, the tests would have inherited to ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    children = []
    # One that computes has been started to the end: the command knows what it is to stop
    while process.poll() is None and not (children and children[0].cpu_times().user > 0.2):
        time.sleep(0.05)
        children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)

    _, error = process.communicate(timeout=600)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "trl-opsd bench loss: interrupted, no contender is left running"
    assert len(children) == 1
    assert not any(child.is_running() for child in children)
    assert json.loads((tmp_path / "results.json").read_text())["repeats"] == 1000000
    assert not (tmp_path / "plot.png").exists()
