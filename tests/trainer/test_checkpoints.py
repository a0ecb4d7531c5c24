"""A resumed run equals the uninterrupted one, bit for bit."""

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import make_model
from transformers import TrainerCallback

from trl_opsd import SelfDistillationTrainer
from trl_opsd.context import SolutionContext
from trl_opsd.serving import ServerError
from trl_opsd.teacher import make_teacher
from trl_opsd.trainer.asking import BatchError
from trl_opsd.trainer.checkpoints import STATE_FILE, begin, finish, newest_complete, read_state


pytestmark = pytest.mark.usefixtures("deterministic")


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args):
    rows = list(dataset) * 4

    def make(
        lora=False, init_lora_weights=True, use_dora=False, seed_of_model=0, rollout_func=None, rows=rows, **settings
    ):
        args = SelfDistillationTrainer.config_class(
            **{
                **training_args,
                "save_strategy": "steps",
                "save_steps": 3,
                "max_steps": 7,
                "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 2,
                **settings,
            }
        )
        return SelfDistillationTrainer(
            model=make_model(tokenizer, seed_of_model),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            rollout_func=rollout_func,
            peft_config=LoraConfig(
                r=4,
                lora_alpha=16,
                target_modules=["q_proj", "down_proj"],
                init_lora_weights=init_lora_weights,
                use_dora=use_dora,
            )
            if lora
            else None,
        )

    return make


def teacher_weights(trainer):
    with trainer.teacher.weights(trainer.model) as teacher, torch.no_grad():
        ids = torch.tensor([trainer.preview_prompts()[1]])
        return teacher(ids).logits.clone()


TEACHERS = [
    {"teacher": "initial"},
    {"teacher": "live"},
    {"teacher": "periodic", "teacher_update_steps": 2},
    {"teacher": "ema", "teacher_update_rate": 0.3},
    {"teacher": "external"},
]


@pytest.fixture
def external(tokenizer, tmp_path):
    """A wider model with the same vocabulary."""
    path = str(tmp_path / "external")
    make_model(tokenizer, seed=5, hidden_size=48).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return {"teacher": "external", "teacher_model_name_or_path": path}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("teacher", TEACHERS, ids=lambda settings: settings["teacher"])
def test_resumed_equals_uninterrupted(make_trainer, lora, teacher, external):
    teacher = external if teacher["teacher"] == "external" else teacher
    assert_resumed_equals_uninterrupted(lambda: make_trainer(lora=lora, **teacher))


@pytest.mark.parametrize(
    "settings",
    [
        {"steps_per_generation": 8},  # checkpoint 3 lies between two generations
        {"num_iterations": 2},
        {"per_device_train_batch_size": 16},  # in the middle of the second epoch
        {"per_device_train_batch_size": 16, "save_steps": 4},  # between two epochs
        {"num_iterations": 2, "steps_per_generation": 4, "num_generations": 2},
        {"teacher": "ema", "teacher_offload": True},
        {"teacher": "periodic", "teacher_offload": True, "teacher_update_steps": 2},
        {"init_lora_weights": False, "lora": True},  # a random adapter, which the initial teacher copies
        {"schedules": {"likelihood_coef": {"kind": "hysteresis", "value": 0.5, "low": 0.1, "warmup_steps": 2}}},
    ],
    ids=str,
)
def test_resumed_equals_uninterrupted_in_the_middle(make_trainer, settings):
    assert_resumed_equals_uninterrupted(lambda: make_trainer(**{"teacher": "initial", **settings}))


class Steps(TrainerCallback):
    def __init__(self):
        self.taken = []

    def on_step_end(self, args, state, control, **kwargs):
        self.taken.append(state.global_step)


def draw(device):
    """The next number of every generator."""
    devices = {torch.device("cpu"), device}
    return [random.random(), np.random.rand(), *(torch.rand((), device=one).item() for one in devices)]


def assert_equal_weights(one, other):
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(
            other.model.state_dict()[name], value, rtol=0, atol=0, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_repeats_itself(make_trainer, lora):
    """Where it did not, because of the kernels of a device, no resumed run could equal the uninterrupted one."""
    trainers = []
    for _ in range(2):
        trainers.append(make_trainer(lora=lora, teacher="live"))
        trainers[-1].train()
    assert_equal_weights(*trainers)


def assert_resumed_equals_uninterrupted(make):
    whole = make()
    whole.train()
    drawn = draw(whole.args.device)
    torch.manual_seed(123)
    resumed = make()
    steps = Steps()
    resumed.add_callback(steps)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / f"checkpoint-{whole.args.save_steps}"))
    assert steps.taken == list(range(whole.args.save_steps + 1, whole.args.max_steps + 1))

    assert draw(resumed.args.device) == drawn
    assert_equal_weights(whole, resumed)
    assert torch.equal(teacher_weights(whole), teacher_weights(resumed))
    for first, second in zip(whole.state.log_history[:-1], resumed.state.log_history[:-1], strict=True):
        timed = {"step_time", "sampling/step_time", "memory/peak"}
        assert {k: v for k, v in first.items() if k not in timed} == {
            k: v for k, v in second.items() if k not in timed
        }


@pytest.mark.parametrize("lora", [False, True])
def test_periodic_teacher_is_the_policy_of_its_last_refresh(make_trainer, lora):
    trainer = make_trainer(lora=lora, teacher="periodic", teacher_update_steps=4, save_steps=4, max_steps=4)
    start = teacher_weights(trainer)
    trainer.train()
    with torch.no_grad():
        ids = torch.tensor([trainer.preview_prompts()[1]])
        policy = trainer.model.eval()(ids).logits
    assert torch.equal(teacher_weights(trainer), policy)
    assert not torch.equal(start, policy)

    trainer = make_trainer(lora=lora, teacher="periodic", teacher_update_steps=4, max_steps=3)
    trainer.train()
    assert torch.equal(teacher_weights(trainer), start)


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"init_lora_weights": False, "use_dora": True}])
def test_adapter_that_does_not_start_at_zero_is_copied(make_trainer, settings):
    """Switching it off would not give back the initial policy."""
    trainer = make_trainer(lora=True, save_strategy="no", max_steps=3, **settings)
    ids = torch.tensor([trainer.preview_prompts()[1]])
    with torch.no_grad():
        initial = trainer.model.eval()(ids).logits
        with trainer.model.disable_adapter():
            assert not torch.allclose(trainer.model(ids).logits, initial, atol=1e-3)
    assert torch.equal(teacher_weights(trainer), initial)
    trainer.train()
    assert torch.equal(teacher_weights(trainer), initial)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not [name for name in trained if "teacher" in name]


class FailingRollouts:
    """The same rollouts in every run, but for one that a server fails to give."""

    def __init__(self, failing_call=None):
        self.calls, self.failing_call = 0, failing_call

    def __call__(self, prompts, trainer):
        self.calls += 1
        if self.calls == self.failing_call:
            raise ServerError("The server failed.")
        ids = trainer.processing_class([str(prompt)[-16:-4] for prompt in prompts])["input_ids"]
        return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": [row[:8] for row in ids]}


@pytest.mark.parametrize(
    ("settings", "failing_call", "step"),
    [
        ({}, 4, 3),
        ({"steps_per_generation": 1}, 8, 3),  # in the middle of the fourth step
        ({"steps_per_generation": 4}, 3, 4),
        ({"save_steps": 4, "num_iterations": 2}, 3, 4),  # where there is a checkpoint already
        ({"save_only_model": True}, 4, 3),
    ],
    ids=str,
)
def test_run_goes_on_where_a_server_failed(make_trainer, settings, failing_call, step):
    settings = {"save_steps": 100, "shuffle_dataset": False, "optim": "sgd", "learning_rate": 0.1, **settings}
    whole = make_trainer(rollout_func=FailingRollouts(), **settings)
    whole.train()
    failed = make_trainer(rollout_func=FailingRollouts(failing_call), **settings)
    checkpoint = Path(failed.args.output_dir) / f"checkpoint-{step}"
    with pytest.raises(ServerError, match=f"The server failed. The run is saved in {checkpoint}"):
        failed.train()
    resumed = make_trainer(rollout_func=FailingRollouts(), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


class Tiring(SolutionContext):
    """One that has nothing more to say after some rollouts."""

    reads_rollouts = True
    left = 100

    def teacher_messages(self, row, rollouts):
        if rollouts is not None:
            type(self).left -= 1
            if self.left < 0:
                raise KeyError("lessons")
        return super().teacher_messages(row, rollouts)


def test_run_goes_on_where_a_context_failed(make_trainer, monkeypatch):
    settings = {"save_steps": 100, "optim": "sgd", "learning_rate": 0.1}
    settings |= {"privileged_context": f"{__name__}.Tiring"}
    monkeypatch.setattr(Tiring, "left", 100)
    whole = make_trainer(rollout_func=FailingRollouts(), **settings)
    whole.train()
    monkeypatch.setattr(Tiring, "left", 14)  # 4 for each step
    failed = make_trainer(rollout_func=FailingRollouts(), **settings)
    checkpoint = Path(failed.args.output_dir) / "checkpoint-3"
    with pytest.raises(BatchError, match=f"'lessons' The run is saved in {checkpoint}") as raised:
        failed.train()
    assert isinstance(raised.value.__cause__.__cause__, KeyError)
    monkeypatch.setattr(Tiring, "left", 100)
    resumed = make_trainer(rollout_func=FailingRollouts(), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_server_that_fails_where_no_checkpoint_can_be_made(make_trainer):
    settings = {"save_steps": 100, "steps_per_generation": 3}  # steps of two micro-batches
    with pytest.raises(ServerError, match=r"The server failed\. No step had been trained"):
        make_trainer(rollout_func=FailingRollouts(1), **settings).train()
    trainer = make_trainer(rollout_func=FailingRollouts(2), **settings)
    with pytest.raises(ServerError, match="Resume from the last checkpoint"):
        trainer.train()
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))


def test_checkpoint_that_could_not_be_finished_is_incomplete(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=6)
    saved = []

    def save(directory, is_main_process):
        saved.append(directory)
        if len(saved) == 2:
            raise OSError("No space left on device")

    monkeypatch.setattr(trainer.teacher, "save", save)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    with pytest.warns(match="checkpoint-6 is incomplete"):
        assert newest_complete(trainer.args.output_dir) == str(saved[0])


def test_checkpoint_of_weights_alone(make_trainer):
    trainer = make_trainer(save_only_model=True, teacher="ema", max_steps=3)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-3"
    names = {path.name for path in checkpoint.iterdir()}
    assert "model.safetensors" in names
    assert not [name for name in names if name.startswith(("teacher", "rollouts", "optimizer"))]
    with pytest.raises(ValueError, match="written with `save_only_model=True` and holds no more than weights"):
        make_trainer(teacher="ema").train(resume_from_checkpoint=str(checkpoint))


def test_checkpoint_contents(make_trainer, tokenizer):
    trainer = make_trainer(teacher="periodic", teacher_update_steps=2, max_steps=3)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-3"
    state = json.loads((checkpoint / STATE_FILE).read_text())
    assert state["complete"]
    assert state["files"].keys() == {path.name for path in checkpoint.iterdir()} - {STATE_FILE}
    assert state["settings"]["teacher"] == "periodic"
    assert state["parts"]["counts"]["num_generated_tokens"] == trainer._num_generated_tokens > 0
    weights = load_file(checkpoint / "teacher.safetensors")
    assert weights.keys() == dict(trainer.model.named_parameters()).keys()
    reloaded = type(trainer.model).from_pretrained(checkpoint)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], value.cpu())


@pytest.fixture
def checkpoints(make_trainer):
    """Folder with the complete checkpoints 3 and 6."""
    trainer = make_trainer(max_steps=6)
    trainer.train()
    return Path(trainer.args.output_dir)


def test_resuming_with_another_model_is_refused(make_trainer, checkpoints):
    with pytest.raises(ValueError, match=r"The policy is not the one .*checkpoint-3 was started with"):
        make_trainer(seed_of_model=1).train(resume_from_checkpoint=str(checkpoints / "checkpoint-3"))


def test_resuming_with_another_external_teacher_is_refused(make_trainer, tokenizer, external):
    trainer = make_trainer(max_steps=3, **external)
    trainer.train()
    make_model(tokenizer, seed=6, hidden_size=48).save_pretrained(external["teacher_model_name_or_path"])
    with pytest.raises(ValueError, match="The external teacher is not the one"):
        make_trainer(**external).train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-3"))


def test_resuming_from_another_trainers_checkpoint_is_refused(make_trainer, checkpoints):
    (checkpoints / "checkpoint-3" / STATE_FILE).unlink()
    with pytest.raises(ValueError, match="was not written by one of these trainers"):
        make_trainer().train(resume_from_checkpoint=str(checkpoints / "checkpoint-3"))


def test_resuming_another_run_is_refused(make_trainer, checkpoints, monkeypatch):
    checkpoint = str(checkpoints / "checkpoint-3")
    for name, there, here in [
        ("teacher", "initial", "periodic"),
        ("privileged_context", "solution", "answer"),
        ("context_kwargs", None, {"column": "answer"}),
        ("teacher_generation_prefix", None, "Hm. "),
        ("teacher_chat_template_kwargs", None, {"enable_thinking": True}),
        ("success_threshold", 1.0, 0.5),
        ("per_device_train_batch_size", 2, 1),
        ("gradient_accumulation_steps", 2, 1),
        ("num_generations", 1, 2),
        ("num_iterations", 1, 2),
        ("shuffle_dataset", True, False),
        ("seed", 42, 43),
    ]:
        message = f"checkpoint-3 was written with `{name}={there!r}` and cannot be resumed with `{name}={here!r}`: "
        with pytest.raises(ValueError, match=re.escape(message)):
            make_trainer(**{name: here}).train(resume_from_checkpoint=checkpoint)

    trainer = make_trainer()
    monkeypatch.setattr(trainer.accelerator.state, "num_processes", 4)
    with pytest.raises(ValueError, match="with `num_processes=1` and cannot be resumed with `num_processes=4`"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_resuming_with_other_completions_is_refused(make_trainer, checkpoints, dataset):
    rows = [{**row, "completion": "4"} for row in dataset] * 4
    trainer = make_trainer(rows=rows, completions="dataset")
    with pytest.raises(ValueError, match="cannot be resumed with `completions='dataset'`"):
        trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-3"))


def test_resuming_with_other_data_is_refused(make_trainer, checkpoints, dataset):
    rows = list(dataset) * 4
    for other, length in (
        (rows[:-1], 63),
        ([*rows[1:], rows[0]], 64),
        ([{**rows[0], "solution": "12"}, *rows[1:]], 64),
    ):
        message = rf"`train_dataset='64 rows, .*'` and cannot be resumed with `train_dataset='{length} rows, "
        with pytest.raises(ValueError, match=message):
            make_trainer(rows=other).train(resume_from_checkpoint=str(checkpoints / "checkpoint-3"))


def test_what_may_change_in_a_resumed_run(make_trainer, dataset):
    trainer = make_trainer(teacher="ema", teacher_update_rate=0.3, save_steps=1, max_steps=1)
    trainer.train()
    changed = {
        "teacher_update_rate": 0.1,
        "learning_rate": 1e-4,
        "max_steps": 2,
        "logging_steps": 2,
        "temperature": 0.9,
    }
    rows = [{**row, "level": 1} for row in list(dataset) * 4]  # a column that nobody reads
    resumed = make_trainer(teacher="ema", rows=rows, **changed)
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-1"))
    assert resumed.state.global_step == 2


def test_a_run_that_was_finished_takes_no_further_step(make_trainer, checkpoints):
    trainer = make_trainer(max_steps=6)
    trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-6"))
    assert trainer.state.global_step == 6
    finished = load_file(checkpoints / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(trainer.model.state_dict()[name].cpu(), value) for name, value in finished.items())


def test_counts_go_on(make_trainer, checkpoints):
    state = read_state(checkpoints / "checkpoint-3")
    parts = {**state["parts"], "guards": {**state["parts"]["guards"], "skipped_steps": 5}}
    finish(checkpoints / "checkpoint-3", {**state, "parts": parts})
    trainer = make_trainer(max_steps=4)
    trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-3"))
    assert trainer.state.log_history[-2]["skipped_steps/total"] == 5
    assert trainer.state.log_history[-2]["num_generated_tokens"] > parts["counts"]["num_generated_tokens"] > 0


@pytest.mark.parametrize("damage", ["never finished", "state without a word on it", "file missing", "file cut off"])
def test_torn_checkpoint_is_reported_and_never_loaded(make_trainer, checkpoints, damage):
    torn = checkpoints / "checkpoint-6"
    if damage == "never finished":
        begin(torn)
    elif damage == "state without a word on it":
        (torn / STATE_FILE).write_text('{"teacher": "initial"}')
    elif damage == "file missing":
        (torn / "optimizer.pt").unlink()
    else:
        (torn / "optimizer.pt").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"checkpoint-6 is (incomplete|damaged)"):
        make_trainer().train(resume_from_checkpoint=str(torn))

    trainer = make_trainer(max_steps=4)
    loaded = []
    load = trainer._load_from_checkpoint
    trainer._load_from_checkpoint = lambda checkpoint: (loaded.append(checkpoint), load(checkpoint))
    with pytest.warns(match=r"checkpoint-6 is (incomplete|damaged)"):
        trainer.train(resume_from_checkpoint=True)
    assert loaded == [str(checkpoints / "checkpoint-3")]


def test_no_checkpoint_to_resume_from(make_trainer):
    with pytest.raises(ValueError, match="There is no complete checkpoint"):
        make_trainer().train(resume_from_checkpoint=True)


def test_older_checkpoints_go_when_the_new_one_is_complete(make_trainer, monkeypatch):
    trainer = make_trainer(save_total_limit=1, save_steps=2, max_steps=6)
    there = []

    def watching_finish(directory, state):
        there.append(sorted(path.name for path in directory.parent.glob("checkpoint-*")))
        finish(directory, state)

    monkeypatch.setattr("trl_opsd.trainer.run_state.finish", watching_finish)
    trainer.train()
    assert there == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "checkpoint-6"]]
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-6"]
    assert trainer.args.save_total_limit == 1
    saved = Path(trainer.args.output_dir) / "checkpoint-6" / "training_args.bin"
    assert torch.load(saved, weights_only=False).save_total_limit == 1


def test_checkpoint_written_again_is_incomplete_meanwhile(checkpoints):
    checkpoint = checkpoints / "checkpoint-3"
    begin(checkpoint)
    with pytest.raises(ValueError, match="incomplete"):
        read_state(checkpoint)
    (checkpoint / f"{STATE_FILE}.partial").write_text("left behind")
    finish(checkpoint, {"answer": 42})
    assert read_state(checkpoint) == {"complete": True, "answer": 42}


def test_fsdp_copy_without_weights_is_refused(make_trainer):
    """With RAM-efficient loading, only the first process has weights when the copy is made."""
    trainer = make_trainer()
    plugin = SimpleNamespace(cpu_ram_efficient_loading=True)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=None))
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: true"):
        make_teacher("initial", accelerator, trainer.model)


class Playbook:
    """A part with state, as a context or a schedule may be."""

    def __init__(self):
        self.lines = []

    def state_dict(self):
        return {"lines": self.lines}

    def load_state_dict(self, state):
        self.lines = state["lines"]


def test_a_part_saves_itself_under_its_name(make_trainer):
    written = Playbook()
    trainer = make_trainer(max_steps=3)
    trainer.run_state.add("playbook", written)
    written.lines = ["carry the one"]
    with pytest.raises(ValueError, match="has a part named 'playbook' already"):
        trainer.run_state.add("playbook", Playbook())
    trainer.train()

    resumed, read = make_trainer(max_steps=4), Playbook()
    resumed.run_state.add("playbook", read)
    resumed.train(resume_from_checkpoint=True)
    assert read.lines == ["carry the one"]

    with pytest.raises(
        ValueError, match=r"checkpoint-4 is of another run: it has the state of 'playbook', this run has"
    ):
        make_trainer().train(resume_from_checkpoint=True)


def test_part_without_a_state_in_the_checkpoint_is_refused(make_trainer, checkpoints):
    trainer = make_trainer()
    trainer.run_state.add("playbook", Playbook())
    with pytest.raises(
        ValueError, match=r"this run has the state of 'playbook', it has not\. Resume with what it was"
    ):
        trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-3"))


@pytest.mark.parametrize("what", ["parts", "settings"])
def test_checkpoint_of_another_version_is_refused(make_trainer, checkpoints, what):
    state = read_state(checkpoints / "checkpoint-3")
    if what == "parts":
        state = {**state, "num_generated_tokens": 12, "skipped_steps": 0}
        del state["parts"]
        message = r"was written by another version of this library: it differs in the counts.*new run from its weights"
    else:
        state["settings"]["gone"] = 1
        message = r"was written by another version of this library: it differs in gone\. Resume with that version"
    finish(checkpoints / "checkpoint-3", state)
    with pytest.raises(ValueError, match=message):
        make_trainer().train(resume_from_checkpoint=str(checkpoints / "checkpoint-3"))
