import io
import json
import pickle
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from study.made import run_of

from trl_opsd.experiment import train
from trl_opsd.experiment.arms import BASE_SEED, BASES, TUNING_SEED
from trl_opsd.experiment.tasks import Split
from trl_opsd.experiment.train import run
from trl_opsd.study.arms import ARMS


pytestmark = pytest.mark.cpu("so is the study")

TRAINED = [arm for arm in ARMS.values() if arm.trainer != "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study of few and short problems, with its bases. Everything else is real."""
    with pytest.MonkeyPatch.context() as patch:
        for base in list(BASES.values()):
            splits = {name: Split(16, split.kinds) for name, split in base.family.splits.items()}
            family = replace(base.family, splits=splits, max_completion_length=8)
            recipe = replace(base.recipe, steps=1, batch_size=4)
            patch.setitem(BASES, base.name, replace(base, family=family, recipe=recipe))
        for arm in list(ARMS.values()):
            patch.setitem(ARMS, arm.name, replace(arm, steps=1, batch_size=8, evaluate_every=1))
        folder = tmp_path_factory.mktemp("study")
        results = {base: run(run_of(base), folder) for base in ("middling", "verbose")}
        assert set(results["middling"]["told"]) == {"solution", "terse", "answer"}
        assert set(results["verbose"]["final"]) == {"test", "tune"}
        yield folder


@pytest.mark.parametrize("name", [arm.name for arm in TRAINED])
def test_every_arm_trains_and_counts(folder, name):
    arm = ARMS[name]
    result = run(run_of(arm.bases[-1], 1, name, 1e-3), folder)
    family = BASES[arm.bases[-1]].family
    assert [point["step"] for point in result["curve"]] == [0, 1]
    if arm.trainer == "trl_sft":
        assert result["generated_tokens"] == 0
        assert result["learner_tokens"] > 8 * 20
    else:
        # Eight rollouts of at most eight tokens
        assert 8 <= result["generated_tokens"] <= 8 * 8
        assert result["learner_tokens"] > result["generated_tokens"]
    assert result["curve"][-1]["generated_tokens"] == result["generated_tokens"]
    assert len(result["series"].get("frac_reward_zero_std", [])) == (1 if arm.trainer == "trl_grpo" else 0)
    assert set(result["final"]) == set(family.held_out)
    assert result["seconds"] > 0
    json.dumps(result)


def test_the_told_arm_reads_the_instruction(folder, monkeypatch):
    prompts = []

    def evaluate(model, tokenizer, its, *args, **kwargs):
        prompts.extend(its)
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_opsd.playground.evaluate.evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        run(run_of("verbose", 1, "told"), folder)
    assert all(prompt[-1]["content"].startswith("Be brief: ") for prompt in prompts)


def test_arms_differ_by_what_they_say(folder):
    def trainer(name):
        arm = ARMS[name]
        spec = run_of(arm.bases[-1], 1, name, 1e-3)
        rows = spec.base.family.make(BASE_SEED)["train"]
        model = str(folder / "bases" / spec.base.name)
        return train.make_trainer(spec, model, rows, str(folder / "out"))

    opsd = trainer("opsd").args
    assert (opsd.teacher, opsd.divergence, opsd.divergence_clip, opsd.completions) == (
        "initial",
        "forward_kl",
        None,
        "on_policy",
    )
    assert opsd.privileged_context == "solution"
    assert opsd.context_kwargs["column"] == "solution"
    assert trainer("opsd_clip").args.divergence_clip == 0.05
    assert trainer("opsd_answer").args.privileged_context == "answer"
    assert trainer("opsd_terse").args.context_kwargs["column"] == "terse"
    assert trainer("off_policy").args.completions == "teacher"
    assert trainer("grpo").args.num_generations == 8
    assert trainer("opsdc_10").args.teacher_update_steps == 10
    assert trainer("opsdc_frozen").args.teacher == "initial"
    assert trainer("opsdc_50").args.divergence == "reverse_kl"
    assert trainer("opsd_long").args.lr_scheduler_type == "constant_with_warmup"
    assert trainer("opsd_short").args.lr_scheduler_type == "cosine"
    assert trainer("off_policy_terse").args.context_kwargs["column"] == "terse"
    terse, full = trainer("sft_terse"), trainer("sft")
    assert max(map(len, terse.train_dataset["input_ids"])) < min(map(len, full.train_dataset["input_ids"]))


def test_a_run_that_fails_leaves_its_error(tmp_path, monkeypatch):
    stdin = SimpleNamespace(buffer=io.BytesIO(pickle.dumps(run_of("weak", 1, "sft"))))
    monkeypatch.setattr(sys, "stdin", stdin)
    path = tmp_path / "runs" / "sft.json"  # there is no base
    train.main([str(path)])
    result = json.loads(path.read_text())
    assert result["error"]
    assert result["settings"] == run_of("weak", 1, "sft").settings()


def test_tuning_sees_its_own_problems_only(folder):
    assert set(run(run_of("middling", TUNING_SEED, "sft", 1e-3), folder)["final"]) == {"tune"}


def test_a_run_is_a_function_of_its_seed(folder):
    spec = run_of("middling", 1, "opsd", 1e-3)
    torch.manual_seed(7)
    first = run(spec, folder)
    torch.manual_seed(8)
    again = run(spec, folder)
    for left in (first, again):
        assert all(point.pop("seconds") >= 0 for point in left["curve"])
    for name in ("curve", "final", "generated_tokens", "learner_tokens"):
        assert first[name] == again[name]
    assert run(run_of("middling", 2, "opsd", 1e-3), folder)["generated_tokens"] != first["generated_tokens"]
