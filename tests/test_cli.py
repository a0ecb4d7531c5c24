import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import CalledProcessError

import pytest
import yaml

from trl_opsd import cli
from trl_opsd.methods import METHODS


@pytest.fixture
def launched(monkeypatch):
    """What would have been handed to `accelerate launch`."""
    calls = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", calls.append)
    return calls


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("max_steps: 3\n")
    return str(path)


@pytest.mark.parametrize("args", [["--help"], []])
def test_help_imports_nothing_heavy(args):
    code = f"""
import sys
from trl_opsd.cli import main
try:
    main({args})
finally:
    heavy = {{"torch", "transformers", "trl", "datasets", "accelerate", "rich", "yaml"}} & set(sys.modules)
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    for command in (*METHODS, "distill", "eval", "compare", "report", "generate", "bench", "env"):
        assert re.search(rf"^    {command}\s", done.stdout, re.MULTILINE), command
    assert re.search(r"opsdc +Train a model to reason in fewer tokens\.", done.stdout)


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(cli, "version", lambda name: f"{name} 1.2.3")

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "trl-opsd 1.2.3\n"


def test_env_runs_here_and_not_under_accelerate(monkeypatch, launched):
    printed = []
    monkeypatch.setattr("trl_opsd.scripts.env.print_env", lambda: printed.append(True))

    assert cli.main(["env"]) == 0
    assert printed == [True]
    assert not launched


def test_unknown_command(capsys):
    assert cli.main(["opsdd"]) == 2
    assert capsys.readouterr().err == "trl-opsd: error: unknown command `opsdd`. Did you mean `opsd`?\n"
    assert cli.main(["xyzzy"]) == 2
    assert "unknown command `xyzzy`. Choose from: opsd, purified_opsd, opsdc, " in capsys.readouterr().err


@pytest.mark.parametrize("command", [*METHODS, "distill"])
def test_launch_flags_go_to_accelerate_and_fields_to_the_script(command, launched, recipe):
    args = ["--num_processes", "2", "--max_steps", "2", "--mixed_precision=bf16", "--config", recipe, "--use_vllm"]

    assert cli.main([command, *args]) == 0

    (launch,) = launched
    assert (launch.num_processes, launch.mixed_precision) == (2, "bf16")
    assert (launch.module, launch.training_script) == (True, "trl_opsd.scripts.train")
    assert launch.training_script_args == [command, "--max_steps", "2", "--config", recipe, "--use_vllm"]


def test_the_number_of_processes_is_not_judged_before_they_exist(launched, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    # One process alone could not make 8 rollouts of a prompt.
    recipe.write_text("num_generations: 8\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 1\n")

    assert cli.main(["opsd", "--config", str(recipe), "--num_processes", "4"]) == 0
    assert len(launched) == 1


def test_accelerate_config_by_name(launched, monkeypatch, tmp_path, recipe):
    (tmp_path / "accelerate").mkdir()
    for name in ("zero3", "ddp"):
        (tmp_path / "accelerate" / f"{name}.yaml").write_text("num_processes: 1\n")
    monkeypatch.setattr(cli, "recipes_folder", lambda: tmp_path)

    assert cli.main(["opsd", "--config", recipe, "--accelerate_config", "zero3"]) == 0
    assert cli.main(["opsd", "--config", recipe, "--accelerate_config=ddp"]) == 0
    by_path = str(tmp_path / "accelerate" / "ddp.yaml")
    assert cli.main(["opsd", "--config", recipe, "--accelerate_config", by_path]) == 0

    files = [Path(launch.config_file).name for launch in launched]
    assert files == ["zero3.yaml", "ddp.yaml", "ddp.yaml"]


def test_shipped_accelerate_configs_are_found(launched, recipe):
    assert cli.main(["opsd", "--config", recipe, "--accelerate_config", "zero3"]) == 0
    assert "DEEPSPEED" in Path(launched[0].config_file).read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--accelerate_config", "zero9"], "`--accelerate_config zero9` is neither a file nor one of: "),
        (["--accelerate_config"], "`--accelerate_config ` is neither"),
        (["--learning_rat", "1"], "Did you mean `--learning_rate`?"),
        (["--num_proceses", "1"], "Did you mean `--num_processes`?"),
        (["recipe.yaml"], "Did you mean `--config recipe.yaml`?"),
        (["--multi_gpu", "recipe.yaml"], "Did you mean `--config recipe.yaml`?"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_errors(args, message, launched, capsys):
    assert cli.main(["opsd", *args]) == 2

    error = capsys.readouterr().err
    assert error.startswith("trl-opsd opsd: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not launched


def test_unknown_key_is_refused_before_the_launch(launched, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("divergense: jsd\n")

    assert cli.main(["opsd", "--config", str(recipe)]) == 2
    assert "`divergense`. Did you mean `divergence`?" in capsys.readouterr().err
    assert not launched


def test_command_help_explains_fields(launched, capsys):
    with pytest.raises(SystemExit):
        cli.main(["opsdc", "--help"])

    output = capsys.readouterr().out
    assert output.startswith("usage: trl-opsd opsdc --config recipe.yaml")
    assert "--teacher_update_steps" in output
    assert not launched


def test_status_of_a_failed_run(monkeypatch, recipe, capsys):
    def fail(launch):
        raise CalledProcessError(3, "python")

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)

    # What went wrong was shown by the run itself.
    assert cli.main(["opsd", "--config", recipe]) == 3
    assert capsys.readouterr().err == ""


class _Signal(Exception):
    """As torch's launcher raises it."""

    def __init__(self, sigval):
        self.sigval = sigval


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), _Signal(signal.SIGINT)], ids=["one", "several"])
def test_interrupted_training(recipe, monkeypatch, capsys, interrupt):
    def fail(launch):
        raise interrupt

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)

    assert cli.main(["opsd", "--config", recipe]) == 130
    error = capsys.readouterr().err
    assert error.startswith("trl-opsd opsd: interrupted. `--resume_from_checkpoint auto`")
    assert error.count("\n") == 1


def test_training_that_is_told_to_end(recipe, monkeypatch):
    def fail(launch):
        raise _Signal(signal.SIGTERM)

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    with pytest.raises(_Signal):
        cli.main(["opsd", "--config", recipe])


@pytest.mark.cpu("launched so")
@pytest.mark.slow
def test_ctrl_c_ends_a_training_command_in_words(tmp_path, model_path):
    (tmp_path / "rows.jsonl").write_text('{"problem": "2 + 2?", "solution": "4"}\n' * 8)
    settings = {"model_name_or_path": model_path, "dataset_name": str(tmp_path / "rows.jsonl"), "save_steps": 2}
    settings |= {"output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "report_to": "none"}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_completion_length": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**settings, "max_steps": 5000}))
    run = subprocess.Popen(
        [sys.executable, "-m", "trl_opsd.cli", "opsd", "--config", str(tmp_path / "recipe.yaml")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever runs the tests in the background ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        while run.poll() is None and not (tmp_path / "run" / "checkpoint-2").exists():
            time.sleep(0.2)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        *_, last = run.communicate(timeout=600)[1].splitlines()
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 130
    assert last.startswith("trl-opsd opsd: interrupted. `--resume_from_checkpoint auto` goes on")


@pytest.mark.cpu("launched so")
@pytest.mark.slow
def test_training_run(tmp_path, model_path):
    rows = [{"problem": f"{n} + {n}?", "solution": f"{2 * n}"} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": model_path,
                "dataset_name": str(tmp_path / "rows.json"),
                "output_dir": str(tmp_path / "out"),
                "use_cpu": True,
                "bf16": False,
                "report_to": "none",
                "max_steps": 1,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 1,
                "max_completion_length": 4,
            }
        )
    )
    args = ["opsd", "--config", str(tmp_path / "recipe.yaml"), "--cpu", "--num_processes", "1"]

    assert cli.main(args) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
