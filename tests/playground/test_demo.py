import json
import math
import re
import subprocess
import sys

import pytest
from peft import PeftConfig
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_opsd.methods import config_class
from trl_opsd.playground import demo, world


pytestmark = [pytest.mark.cpu("so are the demo's recipes"), pytest.mark.needs("matplotlib")]

OVERRIDES = [
    "--max_steps",
    "2",
    "--save_steps",
    "1",
    "--per_device_train_batch_size",
    "8",
    "--max_completion_length",
    "8",
]


@pytest.fixture
def small_worlds(monkeypatch):
    for name in ("opsd", "opsdc"):
        monkeypatch.setitem(
            world.WORLDS, name, world.World(digits=2, base_rows=32, train_rows=16, test_rows=6, chatty=name == "opsdc")
        )


def run(method, folder, overrides=OVERRIDES, seed=3):
    console = Console(width=200, record=True, force_terminal=False)
    results = demo.run_demo(
        method,
        seed,
        folder,
        demo.recipes_folder() / f"playground/{method}.yaml",
        overrides,
        base_steps=2,
        console=console,
    )
    return results, console.export_text()


@pytest.mark.parametrize("method", ["opsd", "opsdc", "correct_only", "rlrt", "star"])
def test_demo_leaves_a_model_results_and_a_page(tmp_path, small_worlds, method):
    results, output = run(method, tmp_path)
    assert results["steps"] == 2
    tries = 2 if method == "star" else 1  # what is wrong is sampled again
    assert 0 < results["num_generated_tokens"] <= tries * 2 * 8 * 8
    assert results["curve"]["step"] == [1, 2]
    # Nothing is right yet, so that some teachers have no peer to read, or no rollout to score.
    assert all(value is None or value >= 0 for value in results["curve"]["divergence"])
    assert (None in results["curve"]["divergence"]) == (method in ("correct_only", "rlrt", "star"))
    assert None not in results["curve"]["accuracy"]
    assert results["problems"] == 6
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert "on held-out problems, seed 3" in output

    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template is not None
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 16

    page = (tmp_path / "index.html").read_text()
    assert "Held-out accuracy (%)</text>" in page
    assert f"{results['after']['mean_tokens']:.1f}" in page
    assert results["examples"][0]["problem"] in page
    # What the report of any run has: settings, curves and cost
    assert f"default of {config_class(method).__name__}" in page
    assert "<figcaption>Length of rollouts: " in page
    assert f"<td>{results['num_generated_tokens']:,}</td>" in page
    assert not re.search(r'src="|href="(?!#|https://huggingface.co/papers/)', page)  # self-contained


@pytest.mark.parametrize(
    ("method", "told", "title", "values"),
    [
        ("opsd", "base, reading the solution", "Right rollouts in training (%, sampled)", [25, math.nan, 75]),
        ("opsdc", "base, told to be brief", "Rollout length in training (tokens)", [30, 20, 10]),
    ],
)
def test_plot_shows_before_and_after_and_the_curves(method, told, title, values):
    results = {
        "method": method,
        "before": {"accuracy": 0.25, "mean_tokens": 40.0},
        "told": {"accuracy": 1.0, "mean_tokens": 30.5},
        "after": {"accuracy": 0.875, "mean_tokens": 20.0},
        "curve": {
            "step": [1, 2, 3],
            "divergence": [0.5, 0.25, 0.125],
            "accuracy": [0.25, None, 0.75],
            "tokens": [30.0, 20.0, 10.0],
        },
    }
    accuracy, length, divergence, rollouts = demo.plot(results).axes
    for axes, heights in ((accuracy, [25, 100, 87.5]), (length, [40, 30.5, 20])):
        assert [bar.get_height() for bar in axes.patches] == heights
        assert [text.get_text() for text in axes.texts] == [f"{height:.1f}" for height in heights]
        names = [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()]
        assert names == ["base", told, f"after {method.upper()}"]
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > max(heights)
    assert (accuracy.get_title(), length.get_title()) == ("Held-out accuracy (%)", "Mean response length (tokens)")
    for axes, curve in ((divergence, [0.5, 0.25, 0.125]), (rollouts, values)):
        [line] = axes.lines
        assert line.get_xdata().tolist() == [1, 2, 3]
        assert line.get_ydata() == pytest.approx(curve, nan_ok=True)
        assert axes.get_ylim()[0] == 0
        assert axes.get_xlabel() == "optimizer step"
    assert divergence.get_title() == "Divergence from the teacher in training (nats per token)"
    assert rollouts.get_title() == title


def test_a_demo_goes_on_where_it_stopped(tmp_path, small_worlds, monkeypatch):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_progress_callback", lambda progress, task: Stop())
        with pytest.raises(KeyboardInterrupt):
            run("opsd", tmp_path)

    monkeypatch.setattr("trl_opsd.playground.base.train_base", None)  # the base is finished
    results, output = run("opsd", tmp_path)
    assert "is used again" in output
    assert re.search(r"Going on from \S+checkpoint-1\.", output)
    assert results["curve"]["step"] == [1, 2]

    with monkeypatch.context() as patch:
        patch.setattr("trl_opsd.OPSDTrainer", None)  # and now all of it
        again, output = run("opsd", tmp_path)
    assert "Finished already" in output
    assert again == results

    # Other settings: a new run on the same base
    results, output = run("opsd", tmp_path, overrides=["--max_steps", "1", *OVERRIDES[2:]])
    assert "is used again" in output
    assert "Going on" not in output
    assert results["curve"]["step"] == [1]


def test_several_seeds_end_in_one_table(tmp_path, small_worlds, capsys):
    demo.main(["opsd", "--seeds", "0", "1", "--output_dir", str(tmp_path), "--base_steps", "1", *OVERRIDES])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["seed"] for result in results] == [0, 1]
    assert "OPSD, 2 seeds" in capsys.readouterr().out


def test_methods_of_a_world_share_its_base(tmp_path, small_worlds, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for method in ("opsd", "rlrt"):  # the one with a template, the other with what is known after rollouts only
        demo.main([method, "--base_steps", "1", *OVERRIDES])
    assert capsys.readouterr().out.count("is used again") == 1
    assert {path.parent.parent.name for path in tmp_path.rglob("base")} == {"demo-opsd"}
    demo.main(["correct_only", "--base_steps", "1", *OVERRIDES])
    assert {path.parent.parent.name for path in tmp_path.rglob("base")} == {"demo-opsd", "demo-opsdc"}


def test_model_flags_are_obeyed(tmp_path, small_worlds):
    run("opsd", tmp_path, overrides=[*OVERRIDES, "--use_peft", "true", "--lora_r", "3"])
    adapter = PeftConfig.from_pretrained(tmp_path / "model")
    assert adapter.r == 3
    assert adapter.base_model_name_or_path == str(tmp_path / "base")
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in saved.items() if "lora_B" in name)  # they start at zero


@pytest.mark.parametrize(
    "flags", [["--model_name_or_path", "mine"], ["--dataset-name=mine"], ["--system_prompt", "Be brief."]]
)
def test_flags_that_would_change_nothing_are_refused(tmp_path, flags):
    name = flags[0].partition("=")[0]
    with pytest.raises(ValueError, match=f"makes its own base model, problems and checkpoints: `{name}` would change"):
        demo.main(["opsd", "--output_dir", str(tmp_path), "--max_steps", "1", *flags])
    assert not list(tmp_path.iterdir())


def test_unknown_flags_are_refused(tmp_path):
    with pytest.raises(ValueError, match="learning_rate"):
        demo.main(["opsd", "--output_dir", str(tmp_path), "--learning_rat", "1"])


def test_examples_show_what_was_learnt_first():
    before = [True, False, False, True, False]
    after = [True, False, True, False, True]
    assert demo._examples(before, after) == [2, 4]
    assert demo._examples(before, after, number=3) == [2, 4, 0]


def test_help_is_quick():
    code = "import sys; from trl_opsd.playground import demo; demo.make_parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
