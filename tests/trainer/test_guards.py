"""Guards in real runs: what they do to them, and what they leave alone."""

import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import make_model
from transformers import TrainerCallback

from trl_opsd import SelfDistillationTrainer
from trl_opsd.guard import GUARDS, MetricGuard
from trl_opsd.trainer.checkpoints import newest_complete, read_state
from trl_opsd.trainer.config import SelfDistillationConfig


pytestmark = pytest.mark.usefixtures("deterministic")

OFF = {name: {"action": "ignore"} for name in GUARDS}
TROUBLE = 5  # the first step of the longer rollouts


class Rollouts:
    """Rollouts of two tokens, and of eight from some step on."""

    def __call__(self, prompts, trainer):
        length = 2 if trainer.state.global_step < TROUBLE - 1 else 8
        ids = trainer.processing_class([str(prompt)[-16:-4] for prompt in prompts])["input_ids"]
        return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": [row[:length] for row in ids]}


def length_guard(action, **kwargs):
    return {**OFF, "length": {"action": action, "high": 3.0, "baseline": 2, "window": 2, **kwargs}}


def fading(completions, trainer_state, **kwargs):
    """Rewards until some step."""
    return [float(trainer_state.global_step < TROUBLE - 1)] * len(completions)


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args):
    def make(guards=None, rollout_func="grows", lora=False, reward_funcs=None, **settings):
        defaults = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "lr_scheduler_type": "constant"}
        args = SelfDistillationConfig(**{**training_args, **defaults, "guards": guards, **settings})
        return SelfDistillationTrainer(
            model=make_model(tokenizer),
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=Dataset.from_list(list(dataset) * 4),
            processing_class=tokenizer,
            rollout_func=Rollouts() if rollout_func == "grows" else None,
            peft_config=LoraConfig(r=4, target_modules=["q_proj"]) if lora else None,
        )

    return make


@pytest.fixture
def said(caplog):
    """What guards warn of, a line each."""
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True  # its own handler writes elsewhere
    logging.getLogger("trl_opsd").propagate = True
    return lambda: [record.getMessage() for record in caplog.records if "guard" in record.name]


def steps_of(run):
    return sorted(int(path.name.split("-")[1]) for path in Path(run).glob("checkpoint-*"))


def weights(trainer):
    return {name: value.cpu().clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def taught(trainer):
    """What its teacher says."""
    with trainer.teacher.weights(trainer.model) as teacher, torch.no_grad():
        return teacher(torch.tensor([trainer.preview_prompts()[1]])).logits.clone()


def history(trainer):
    passing = {"step_time", "sampling/step_time", "memory/peak"}
    passing |= {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    return [
        {name: value for name, value in entry.items() if name not in passing} for entry in trainer.state.log_history
    ]


def test_warnings_change_nothing_in_a_run(make_trainer, said):
    """Those of a run without a word on guards, and those of one whose limits are passed."""
    unwatched = make_trainer(OFF)
    unwatched.train()
    assert not said()
    trainer = make_trainer()
    trainer.train()
    assert history(trainer) == history(unwatched)
    assert_equal(weights(trainer), weights(unwatched))

    warned = make_trainer(length_guard("warn"))
    warned.train()
    assert_equal(weights(warned), weights(unwatched))
    (text,) = said()  # and not again in the two steps that follow
    seen = "The mean length of rollouts (`rollouts/mean_length`) was 8 in the last 2 measurements"
    assert f"Guard `length` at step {TROUBLE + 1}: {seen}, above the limit of 6; in the first 2 it was 2." in text
    assert f"It began with step {TROUBLE}." in text
    assert "What usually helps: " in text
    beyond = [entry.get("guards/length") for entry in warned.state.log_history[:-1]]
    assert beyond == [None] * TROUBLE + [1, 2, 3]


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_a_stop_ends_the_run_with_a_checkpoint(make_trainer, said, logging_steps):
    trainer = make_trainer(length_guard("stop"), logging_steps=logging_steps)
    trainer.train()
    assert trainer.state.global_step == TROUBLE + 1
    assert steps_of(trainer.args.output_dir) == [2, 4, TROUBLE + 1]
    assert trainer.state.log_history[-2]["step"] == TROUBLE + 1
    assert trainer.guards.reason in said()[0]
    assert "The training ends here." in said()[0]

    again = make_trainer(length_guard("stop"), logging_steps=logging_steps)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == TROUBLE + 2  # its trouble has not gone

    whole = make_trainer(OFF)
    whole.train()
    on = make_trainer(OFF)
    on.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / f"checkpoint-{TROUBLE + 1}"))
    assert on.state.global_step == 8
    assert_equal(weights(on), weights(whole))


@pytest.mark.parametrize("stop", [1, 3, 5, 6])
def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(make_trainer, stop):
    guards = length_guard("warn", window=3)
    whole = make_trainer(guards, save_steps=stop)
    whole.train()
    resumed = make_trainer(guards, save_steps=stop)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / f"checkpoint-{stop}"))
    assert resumed.guards.state_dict()["guards"] == whole.guards.state_dict()["guards"]
    assert history(resumed)[:-1] == history(whole)[:-1]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("limit", [None, 1])
def test_rollback_ends_with_the_best_checkpoint_and_goes_on_from_it(make_trainer, said, tmp_path, lora, limit):
    settings = {"lora": lora, "teacher": "ema", "teacher_update_rate": 0.3}
    whole = make_trainer(OFF, **settings, output_dir=str(tmp_path / "whole"))
    whole.train()

    trainer = make_trainer(length_guard("rollback"), **settings, save_total_limit=limit)
    trainer.train()
    run = Path(trainer.args.output_dir)
    best = run / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best)
    assert trainer._last_loaded_step == -1  # vLLM is sent them before it samples again
    assert steps_of(run) == [2, 4][-(limit or 2) :]
    assert steps_of(run / "_rolled_back-1") == [TROUBLE + 1]
    assert newest_complete(str(run)) == str(best)
    assert f"The model is that of {best} again, from before step {TROUBLE}" in said()[1]

    reference = make_trainer(OFF, **settings, max_steps=4, output_dir=str(tmp_path / "reference"))
    reference.train()
    assert_equal(weights(trainer), weights(reference))
    assert torch.equal(taught(trainer), taught(reference))
    if not lora:
        stored = load_file(best / "model.safetensors")
        assert all(torch.equal(weights(trainer)[name], value) for name, value in stored.items())

    on = make_trainer(OFF, **settings)
    on.train(resume_from_checkpoint=True)
    assert_equal(weights(on), weights(whole))
    assert history(on)[:-1] == history(whole)[:-1]


def test_rollback_without_an_earlier_checkpoint_leaves_the_model(make_trainer, said):
    trainer = make_trainer(length_guard("rollback"), save_steps=7)
    trainer.train()
    assert steps_of(trainer.args.output_dir) == [TROUBLE + 1]
    stored = load_file(Path(trainer.args.output_dir) / f"checkpoint-{TROUBLE + 1}" / "model.safetensors")
    assert_equal(weights(trainer), stored)
    assert f"There is no complete checkpoint from before step {TROUBLE}" in said()[1]


def test_rollback_passes_over_a_checkpoint_that_is_damaged(make_trainer):
    class Damage(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == TROUBLE:
                (Path(args.output_dir) / "checkpoint-4" / "optimizer.pt").unlink()

    trainer = make_trainer(length_guard("rollback"))
    trainer.add_callback(Damage())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")


class Evaluations(TrainerCallback):
    """Logs scores at the end of steps, as evaluations do."""

    def __init__(self, trainer, scores):
        self.trainer, self.scores = trainer, scores

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.scores:
            self.trainer.log({"eval_aime24/avg@1": self.scores[state.global_step]})


@pytest.mark.parametrize("limit", [None, 1])
def test_best_evaluation_decides_where_there_are_some(make_trainer, limit):
    guards = {**length_guard("rollback"), "benchmark": {}}
    trainer = make_trainer(guards, save_total_limit=limit, save_steps=1)
    trainer.add_callback(Evaluations(trainer, {1: 0.3, 2: 0.4, 3: 0.35, 5: 0.9}))
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")  # 4 has none, 5 is in trouble


@pytest.mark.parametrize("save_steps", [1, 2])
def test_a_limit_on_checkpoints_leaves_what_is_needed_and_no_more(make_trainer, save_steps):
    settings = {"save_steps": save_steps, "save_total_limit": 1}
    trainer = make_trainer({**OFF, "length": {"action": "rollback", "baseline": 2, "window": 3}}, **settings)
    trainer.train()
    # The newest, those of the last window, and the last one before
    assert steps_of(trainer.args.output_dir) == {1: [6, 7, 8], 2: [6, 8]}[save_steps]


def test_held_out_accuracy_ends_a_run(make_trainer):
    trainer = make_trainer({**OFF, "benchmark": {"action": "rollback"}}, save_steps=1)
    trainer.add_callback(Evaluations(trainer, {1: 0.3, 2: 0.4, 3: 0.2, 4: 0.2}))
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert steps_of(trainer.args.output_dir) == [1, 2]


def test_collapsing_run_is_stopped(make_trainer):
    """A live teacher at a rate that is far too high, and the same run at a rate that is not."""
    settings = {"rollout_func": None, "max_steps": 40, "teacher": "live", "save_strategy": "no"}
    guards = {"entropy": {"action": "stop", "baseline": 4, "window": 3}}
    collapsing = make_trainer(guards, learning_rate=0.1, **settings)
    collapsing.train()
    assert collapsing.state.global_step < 40
    assert "`entropy`" in collapsing.guards.reason
    healthy = make_trainer(guards, learning_rate=1e-5, **settings)
    healthy.train()
    assert healthy.state.global_step == 40


def test_what_was_asked_for_and_is_not_measured_is_said(make_trainer, said):
    make_trainer({"clipped": {}, "length": {}}, max_steps=2).train()
    (text,) = said()
    assert "asks `clipped` to watch was not measured" in text


def test_what_cannot_be_watched_is_said_of_what_was_asked_for(make_trainer, said):
    settings = {"divergence": "reverse_kl", "divergence_support": "sampled_token", "teacher": "live", "max_steps": 5}
    for asked, number in ((None, 0), ({"divergence": {"baseline": 2, "window": 1}}, 1)):
        make_trainer(asked, privileged_context="none", **settings).train()
        assert len(said()) == number
    assert "asks `divergence` to watch is not watched. The first 2 measurements of" in said()[0]


def test_right_rollouts_are_watched(make_trainer, said):
    """Of rewards that are only logged."""
    trainer = make_trainer({**OFF, "correct": {"action": "stop", "baseline": 1, "window": 1}}, reward_funcs=fading)
    trainer.train()
    assert trainer.state.global_step == TROUBLE
    assert "The share of rollouts that are right (`rollouts/correct_rate`) was 0 in" in said()[0]
    rates = [entry.get("rollouts/correct_rate") for entry in trainer.state.log_history[:-1]]
    assert rates == [1.0] * (TROUBLE - 1) + [0.0]


def test_a_guard_that_is_new_in_a_resumed_run_begins_with_what_it_sees(make_trainer):
    trainer = make_trainer(OFF, max_steps=4)
    trainer.train()
    run = Path(trainer.args.output_dir)
    assert not read_state(run / "checkpoint-4")["parts"]["guards"]["guards"]
    resumed = make_trainer(length_guard("stop"))
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert resumed.state.global_step == 8  # all it saw were long


class Other(MetricGuard):
    """A user's own."""

    metric, what, advice = "entropy", "The entropy", "less of it."

    def limits(self, first):
        return -1.0, 0.0


def test_guard_of_the_users_own(make_trainer):
    guards = {f"{__name__}.Other": {"action": "stop", "baseline": 1, "window": 1}}
    trainer = make_trainer(guards, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("guards", "settings", "match"),
    [
        ({"entrpy": {}}, {}, "(?s)`guards='entrpy'` is none of .*Did you mean `entropy`"),
        ({"entropy": {"lowest": 1}}, {}, r"do not fit `guards='entropy'`, which takes \(.*action.*baseline.*low"),
        ({"entropy": {"action": "halt"}}, {}, "`action` must be one of"),
        ({"entropy": "stop"}, {}, "gives 'entropy' 'stop', and takes keyword arguments"),
        ({"collections.OrderedDict": {}}, {}, "which is no subclass of Guard"),
        (length_guard("rollback"), {"save_strategy": "no"}, "`save_strategy='no'`"),
        (length_guard("rollback"), {"metric_for_best_model": "reward"}, "metric_for_best_model='reward'"),
    ],
)
def test_guards_that_cannot_be_are_refused_before_the_model_is_loaded(
    training_args, tokenizer, dataset, guards, settings, match
):
    args = SelfDistillationConfig(**{**training_args, "save_strategy": "steps", "guards": guards, **settings})
    with pytest.raises(ValueError, match=match):
        SelfDistillationTrainer("no/such-model", args=args, train_dataset=dataset, processing_class=tokenizer)
