"""What a run leaves for whoever looks at it: its settings, and its log."""

import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from trl_opsd import OPSDConfig, OPSDTrainer, SelfDistillationConfig, SelfDistillationTrainer
from trl_opsd.files import TRAINING_RECORD
from trl_opsd.trainer import record
from trl_opsd.trainer.metrics import Metrics, add_peak_memory, peak_memory


@dataclass
class Inputs:
    dataset_name: str | None = None
    seldom_set: int = 3
    some_token: str | None = None


@pytest.fixture
def make(model_path, dataset, training_args):
    def make(trainer_class=OPSDTrainer, config_class=OPSDConfig, callbacks=None, **fields):
        args = config_class(**{**training_args, "max_steps": 2, "logging_steps": 1, **fields})
        return trainer_class(model=model_path, args=args, train_dataset=dataset, callbacks=callbacks)

    return make


def read(trainer, name=TRAINING_RECORD):
    with open(f"{trainer.args.output_dir}/{name}", encoding="utf-8") as file:
        return json.load(file)


def test_settings_are_kept_with_the_defaults_they_differ_from(make):
    trainer = make(divergence_clip=0.5, hub_token="secret")
    trainer.record.inputs = [Inputs(dataset_name="sums", some_token="secret")]
    trainer.train()
    kept = read(trainer)
    [session] = kept["sessions"]

    assert (kept["method"]["name"], kept["method"]["paper"]) == ("OPSD", "2601.18734")
    assert kept["config"] == "OPSDConfig"
    assert dict(kept["summary"])["clip"] == "0.5 per vocabulary entry"
    assert session["settings"]["divergence_clip"] == 0.5
    assert session["defaults"]["divergence_clip"] == 0.05  # the method's
    assert session["step"] == 0
    assert session["versions"]["torch"] == version("torch")  # `torch.__version__` may go on with its build
    # What follows from other settings is no choice
    assert session["settings"]["steps_per_generation"] is not None
    assert "steps_per_generation" not in session["defaults"]
    assert (session["settings"]["dataset_name"], session["defaults"]["dataset_name"]) == ("sums", None)
    assert "seldom_set" not in session["defaults"]
    assert "secret" not in json.dumps(kept)


def test_what_guards_say_is_kept(make):
    class Trouble(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.guards.tell(f"It falls at step {state.global_step}.")

    trainer = make(callbacks=[Trouble()])
    trainer.train()
    [session] = read(trainer)["sessions"]
    assert session["guards"] == ["It falls at step 1.", "It falls at step 2."]


def test_a_run_without_a_method_has_none(make):
    trainer = make(SelfDistillationTrainer, SelfDistillationConfig)
    trainer.train()
    assert read(trainer)["method"] is None


def test_the_log_is_kept_while_a_run_goes_on(make, monkeypatch):
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step:
                seen.append([row["step"] for row in read(trainer, "trainer_state.json")["log_history"]])

    trainer = make(callbacks=[Look()], max_steps=3, save_strategy="no")
    trainer.train()
    assert seen == [[1], [1]]  # the second comes too soon after the first
    monkeypatch.setattr(record, "_PAUSE", 0.0)
    again = make(callbacks=[Look()], max_steps=3, save_strategy="no")
    seen.clear()
    again.train()
    assert seen == [[1], [1, 2]]
    log = read(again, "trainer_state.json")["log_history"]
    assert log == again.state.log_history
    assert "train_runtime" in log[-1]


def test_an_evaluation_is_kept_and_replaces_no_log(make, dataset):
    trainer = make()
    trainer.train()
    trainer.evaluate(dataset)
    assert "eval_loss" in read(trainer, "trainer_state.json")["log_history"][-1]
    make().evaluate(dataset)  # of another trainer with the same folder
    assert len(read(trainer, "trainer_state.json")["log_history"]) == len(trainer.state.log_history)


def test_a_resumed_run_keeps_what_it_was_begun_with(make):
    make(save_strategy="steps", save_steps=1, max_steps=1).train()
    trainer = make(learning_rate=0.125)
    trainer.train(resume_from_checkpoint=True)
    first, second = read(trainer)["sessions"]
    assert (first["step"], second["step"]) == (0, 1)
    assert second["settings"]["learning_rate"] == 0.125 != first["settings"]["learning_rate"]
    assert {row["step"] for row in read(trainer, "trainer_state.json")["log_history"]} == {1, 2}

    make().train()  # from the beginning
    assert [session["step"] for session in read(trainer)["sessions"]] == [0]


def test_time_of_sampling(make, monkeypatch):
    trainer = make(max_steps=3, gradient_accumulation_steps=2)
    generate, taken = trainer.sampler._generate, []

    def slow(*asked):
        started = time.perf_counter()
        time.sleep(0.5)
        completions = generate(*asked)
        taken.append(time.perf_counter() - started)
        return completions

    monkeypatch.setattr(trainer.sampler, "_generate", slow)
    trainer.evaluate(trainer.train_dataset.select(range(4)))  # which counts for nothing
    taken.clear()
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert "sampling/step_time" not in logged[0]  # of the steps before
    assert len(taken) == len(logged) == 3
    for row, seconds in zip(logged[1:], taken, strict=False):
        assert row["sampling/step_time"] == pytest.approx(seconds, abs=0.3)


def test_peak_memory(make, monkeypatch):
    trainer = make()
    trainer.train()
    peaks = [row.get("memory/peak") for row in trainer.state.log_history if "loss" in row]
    assert peaks[0] is None  # of the steps before
    assert 0.05 < peaks[1] < 500

    metrics = Metrics()
    add_peak_memory(metrics, torch.device("cpu"))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 3 * 2**30)
    add_peak_memory(metrics, torch.device("cpu"))
    assert metrics._maxima["memory/peak"].item() < 500

    class Windows:
        def memory_info(self):
            return SimpleNamespace(rss=2**30, peak_wset=3 * 2**30)

    monkeypatch.setattr("psutil.Process", Windows)
    monkeypatch.setattr("sys.platform", "win32")
    assert peak_memory() == 3 * 2**30
