"""What a method or one of its parts cannot be given ends in one clear error, before the model is loaded."""

import math

import pytest
import torch
from datasets import Dataset
from methods.stand_ins import STAND_INS
from tiny import make_model

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer
from trl_opsd.methods import METHODS, config_class
from trl_opsd.signal import Advantage, TokenWeighting
from trl_opsd.trainer.checks.parts import check_signals
from trl_opsd.trainer.signals import make_signals


ROW = {"prompt": [{"role": "user", "content": "What is 3 + 4?"}], "solution": "It is 7.", "answer": "7"}


# They compare no rollouts of a prompt
NEED_NO_GROUP = {
    "opsd", "purified_opsd", "opsdc", "sdft", "correct_only", "resd", "egrsd", "cl_egrsd", "msd", "rethinking_opd",
    "rethinking_opd_code", "vopd", "star",
}  # fmt: skip


def says_something(completions, **kwargs):
    return [float(bool(completion[0]["content"])) for completion in completions]


class Unloaded:
    """A model of which nothing but its configuration may be asked."""

    class config:
        _name_or_path = name_or_path = "unloaded"


@pytest.fixture
def refused(training_args):
    def check(name, match, reward_funcs=says_something, **settings):
        args = config_class(name)(**{**training_args, "per_device_train_batch_size": 8, **settings})
        with pytest.raises(ValueError, match=match):
            SelfDistillationTrainer(
                Unloaded(), reward_funcs=reward_funcs, args=args, train_dataset=Dataset.from_list([ROW] * 8)
            )

    return check


@pytest.mark.parametrize(("name", "close"), [("rlrtt", "rlrt"), ("sdppo", "sdpo"), ("correct-only", "correct_only")])
def test_unknown_method(name, close):
    with pytest.raises(ValueError, match=rf"Unknown method: `{name}`. Did you mean `{close}`\?"):
        config_class(name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"privileged_context": "peer"}, "`privileged_context='peer'` is none of .*Did you mean `peers`"),
        ({"completions": "hinted_retries"}, "`completions='hinted_retries'` is none of .*Did you mean `hinted_retry`"),
        ({"token_weights": {"correct": {}}}, "`token_weights='correct'` is none of .*Did you mean `correct_only`"),
        ({"advantage": "grop"}, "`advantage='grop'` is none of .*Did you mean `grpo`"),
        (
            {"schedules": {"likelihood_coef": {"kind": "hysterisis"}}},
            r"`schedules\['likelihood_coef'\]='hysterisis'` is none of .*Did you mean `hysteresis`",
        ),
        ({"advantage": "trl_opsd.methods.rlrt.Reversed"}, "cannot be imported: .*'Reversed'"),
        ({"advantage": "collections.Counter"}, "`advantage` names Counter, which is no subclass of"),
    ],
)
def test_unknown_part(refused, settings, message):
    refused("distill", message, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sdpo", {"context_kwargs": {"corect": 1}}, r"{'corect': 1} do not fit .*\(correct: int = 1, .*corect"),
        ("rlsd", {"advantage_kwargs": {"mixx": 1.0}}, r"which takes \(mix: float = 0.5, clip: float = 0.2\)"),
        ("sdft", {"token_weights": {"skip_first": {"tokens": 3}}}, r"which takes \(num_tokens: int = 3\)"),
        ("star", {"completions_kwargs": {"lmbda": 0.5}}, r"do not fit `completions='hinted_retry'`, which takes \("),
        (
            "rlrt",
            {"schedules": {"advantage.mix": {"start": 0.5}}},
            r"do not fit `schedules\['advantage.mix'\]='linear'`, which takes \(start: float, end: float, ",
        ),
    ],
)
def test_arguments_that_do_not_fit(refused, name, settings, message):
    refused(name, message, **settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sdpo", "The peers context needs rewards"),
        ("ssopd", "ShortestForLongest needs rewards"),
        ("rlrt", "The peers context needs rewards"),
        ("rlsd", "`policy_loss_coef=1.0` needs `reward_funcs`"),
        ("egrsd", "`policy_loss_coef=1.0` needs `reward_funcs`"),
        ("correct_only", "`token_weights` has CorrectOnly, which needs `reward_funcs`"),
        ("star", "`completions='hinted_retry'` has to tell right from wrong. Pass `reward_funcs`"),
    ],
)
def test_methods_that_need_a_reward(refused, name, message):
    refused(name, message, reward_funcs=None)


@pytest.mark.parametrize("name", [name for name, stand_in in STAND_INS.items() if stand_in.has_reward])
def test_no_method_that_needs_a_reward_begins_without(refused, name):
    says = "needs rewards, which tell|needs `reward_funcs`|has to tell right from wrong|adds to rewards"
    refused(name, says, reward_funcs=None, **STAND_INS[name].settings)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in NEED_NO_GROUP])
def test_no_method_that_needs_a_group_begins_without(refused, name):
    settings = {**STAND_INS[name].settings, "num_generations": 1}
    refused(name, "`num_generations` (of at least 2|to be a multiple of)", **settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sdpo", "The peers context needs `num_generations` of at least 2, got 1"),
        ("u_opsd", "MajorityForOther needs `num_generations` of at least 2, got 1"),
        ("ssopd", "ShortestForLongest needs `num_generations` of at least 2, got 1"),
        ("rlrt", "The peers context needs `num_generations` of at least 2, got 1"),
        ("rlsd", "`policy_loss_coef=1.0` needs `num_generations` of at least 2"),
    ],
)
def test_methods_that_need_a_group(refused, name, message):
    refused(name, message, num_generations=1)


def test_an_entropy_that_a_server_does_not_tell(tmp_path):
    served = {"teacher": "external", "teacher_server_base_url": "http://localhost:1", "temperature": 1.0}
    args = config_class("egrsd")(str(tmp_path), use_cpu=True, divergence_support="sampled_token", **served)
    with pytest.raises(ValueError, match="`advantage` names EntropyGated, which reads the teacher's entropy"):
        check_signals(make_signals(args), args, has_reward=True)
    weights = {"trl_opsd.methods.msd.DualPerspective": {}}
    args = SelfDistillationConfig(
        str(tmp_path), use_cpu=True, divergence_support="sampled_token", token_weights=weights, **served
    )
    with pytest.raises(ValueError, match="`token_weights` has DualPerspective, which reads the distribution of"):
        check_signals(make_signals(args), args, has_reward=False)


@pytest.mark.parametrize("context", ["peers", "reflection", "plan"])
def test_a_context_that_comes_too_late_for_a_retry(refused, context):
    settings = {"privileged_context": context, "num_generations": 2}
    refused("star", f"`privileged_context='{context}'` is known only after them", **settings)


@pytest.mark.parametrize(
    ("name", "coefficient"),
    [
        ("rlrt", "advantage.mixx"),
        ("rlrt", "beta"),
        ("vopd", "advantage.mix"),
        ("sdft", "token_weights.skip_last.most"),
    ],
)
def test_schedule_of_nothing(refused, name, coefficient):
    schedules = {coefficient: {"start": 1.0, "end": 0.0, "num_steps": 5}}
    refused(name, rf"`schedules` has '{coefficient}', .* no such coefficient: choose one of \[.*", schedules=schedules)


def test_nothing_to_train(refused):
    refused("distill", "Nothing is trained: .* are all 0", divergence_coef=0.0)


def test_importance_at_another_temperature(refused):
    message = "`token_weights` has ImportanceClip, .*`distillation_temperature=0.5`.*`temperature=1.0`"
    refused("sdft", message, distillation_temperature=0.5)


class Narrow(Advantage):
    needs_scores = needs_reward = False

    def __call__(self, batch, scores):
        return torch.ones(len(batch.mask), 1 + batch.mask.size(1))


class Infinite(Advantage):
    needs_scores = needs_reward = False

    def __call__(self, batch, scores):
        return batch.advantages / 0.0 + torch.inf


class Flat(TokenWeighting):
    def __call__(self, batch, scores):
        return batch.correct.flatten()[:-1].float()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage": f"{__name__}.Narrow"}, r"Narrow has to return a tensor of shape \(4, \d+\), got \(4, \d+\)"),
        ({"advantage": f"{__name__}.Infinite"}, "Infinite gave numbers that are not finite for 4 rollouts, row 0"),
        ({"token_weights": {f"{__name__}.Flat": {}}}, r"Flat has to return a tensor of shape \(4, \d+\), got \(3,\)"),
    ],
)
def test_streams_of_the_first_batch(tokenizer, training_args, settings, message):
    args = SelfDistillationConfig(
        **{**training_args, "teacher": "live", "num_generations": 2, "policy_loss_coef": 1.0, **settings}
    )
    data = Dataset.from_list([ROW] * 8)
    trainer = SelfDistillationTrainer(
        make_model(tokenizer), says_something, args, train_dataset=data, processing_class=tokenizer
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()


def partly(completions, **kwargs):
    return [None if index % 2 else float(index == 0) for index in range(len(completions))]


def endless(completions, **kwargs):
    return [float("inf")] * len(completions)


@pytest.mark.parametrize("name", ["sdpo", "rlsd", "correct_only"])
def test_rewards_that_are_not_known_are_counted(tokenizer, training_args, name):
    args = config_class(name)(**{**training_args, **STAND_INS[name].settings})
    given = {"train_dataset": Dataset.from_list([ROW] * 8), "processing_class": tokenizer}
    trainer = SelfDistillationTrainer(make_model(tokenizer), partly, args, **given)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["rewards/unknown_rate"] for entry in steps] == [0.5, 0.5]
    assert all(math.isfinite(entry["loss"]) for entry in steps)
    with pytest.raises(ValueError, match=r"The reward function `endless` gave an infinite reward\. Give a finite"):
        SelfDistillationTrainer(make_model(tokenizer), endless, args, **given).train()
