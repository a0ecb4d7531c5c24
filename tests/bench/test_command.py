import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

from trl_opsd import cli
from trl_opsd.bench import run as bench_run
from trl_opsd.bench.command import _ended_in_order


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
        (["loss", "--contenders", "dense", "denes"], "`contenders` knows no 'denes'. Choose from: ours-compiled, "),
        (["loss", "--contenders", "dense", "dense"], "`contenders` names one twice"),
        (["loss", "--repeats", "0"], "`repeats` must be at least 1, got 0"),
        (["loss", "--warmups", "-1"], "`warmups` must be at least 0, got -1"),
        (["loss", "--num_tokens", "4", "0"], "`num_tokens` must be at least 1, got 0"),
        (["loss", "--vocab_size", "-3"], "`vocab_size` must be at least 1, got -3"),
        (["loss", "--threads", "0"], "`threads` must be at least 1, got 0"),
        (["loss", "--clip", "0"], "`clip` must be positive"),
        (["loss", "--hidden_size", "wide"], "invalid int value: 'wide'"),
        (["loss", "--divergence", "kl"], "invalid choice: 'kl'"),
        (["loss", "--num_tokns", "3"], "unknown field `--num_tokns`, did you mean `--num_tokens`?"),
        (["loss", "--output_dir", "{file}/results"], "cannot be written to (Not a directory). Name another folder."),
        (["step", "--num_rollouts", "0"], "`num_rollouts` must be at least 1, got 0"),
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


def test_loss(tmp_path, capsys, device):
    args = ["--contenders", "ours-eager", "trl-chunked", "floor", "--clip", "1", "--check", "--repeats", "2"]
    assert cli.main([*LOSS, *args, "--device", device.type, "--output_dir", str(tmp_path)]) == 0

    output = capsys.readouterr().out
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
    assert results["device"]["type"] == device.type
    assert results["versions"]["torch"]
    [case] = results["cases"]
    assert case["case"]["num_tokens"] == 8
    ours, chunked, floor = case["contenders"]
    assert len(ours["samples"]) == len(floor["samples"]) == 2
    assert ours["facts"]["gradient_error"] < 1e-4
    assert ours["facts"]["peak_extra_bytes"] >= 0
    assert "peak_extra_bytes" not in floor["facts"]
    assert chunked["samples"] == []
    assert case["order"] == ["ours-eager", "floor"] * 2
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
def test_step(tmp_path, model_path, capsys, device):
    args = ["--contenders", "self-distillation", "--repeats", "1", "--num_rollouts", "2", "--max_new_tokens", "4"]
    args += ["--prompt_tokens", "8", "--teacher_prompt_tokens", "16", "--model", model_path, "--device", device.type]
    assert cli.main(["bench", "step", *args, "--output_dir", str(tmp_path)]) == 0

    [case] = json.loads((tmp_path / "results.json").read_text())["cases"]
    [ours] = case["contenders"]
    assert ours["error"] is None
    assert ours["median"]["learning_seconds"] > 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000


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
    while not children and process.poll() is None:
        time.sleep(0.05)
        children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)

    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "trl-opsd bench loss: interrupted, no contender is left running"
    assert len(children) == 1
    assert not any(child.is_running() for child in children)
