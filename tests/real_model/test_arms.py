"""What is set for all arms alike, and what is planned."""

from dataclasses import replace

import pytest

from trl_opsd.experiment.arms import TUNING_SEED
from trl_opsd.experiment.runner import PROCESSES, planned_seconds
from trl_opsd.real_model.__main__ import COMMAND
from trl_opsd.real_model.arms import ARMS, FULL, PARTS, QUICK, READS, RealRun


TRAINED = [arm for arm in ARMS.values() if arm.trainer != "none"]


def test_every_divergence_is_there_with_and_without_clip():
    opsd = [arm.settings for arm in TRAINED if arm.trainer == "opsd"]
    assert sorted((its["divergence"], its["divergence_clip"] is None) for its in opsd) == [
        (divergence, clip) for divergence in ("forward_kl", "jsd", "reverse_kl") for clip in (False, True)
    ]
    assert {arm.column for arm in TRAINED if arm.trainer == "trl_sft"} == {"solution", "teacher", "mixsd"}
    assert {arm.trainer for arm in ARMS.values()} == {"none", "trl_sft", "sdft", "opsd"}


def test_trained_arms_have_the_same_budget_and_are_tuned_alike():
    assert len({(arm.steps, arm.batch_size, arm.evaluate_every, arm.tuned_as) for arm in TRAINED}) == 1
    for arm, base in FULL.pairs():
        runs = FULL.tuning_runs(arm, base)
        rates = list(FULL.learning_rates) if ARMS[arm].trainer != "none" else []
        assert [run.learning_rate for run in runs] == rates
        assert {run.seed for run in runs} <= {TUNING_SEED}
    assert TUNING_SEED not in FULL.seeds
    assert len(FULL.seeds) >= 3


def test_whoever_reads_reads_the_same():
    readers = [arm for arm in ARMS.values() if arm.trainer in ("sdft", "opsd") or arm.name == "told"]
    assert all(arm.settings.items() >= READS.items() for arm in readers)
    assert not ARMS["floor"].settings


def test_arms_without_training_are_run_in_the_world_of_every_seed():
    for arm in ("floor", "told"):
        assert [run.seed for run in FULL.reported_runs(arm, "facts", None)] == list(FULL.seeds)
    assert FULL.tuning_runs("floor", "facts") == []
    # Nothing of them is scaled
    assert {run.scale for run in QUICK.reported_runs("told", "facts", None)} == {1.0}
    assert {run.scale for run in QUICK.reported_runs("sft", "facts", 1e-4)} == {QUICK.scale}


def test_another_model_or_device_is_another_run():
    args = COMMAND.parser().parse_args(["--model", "Qwen/Qwen3-0.6B", "--device", "cuda", "--quick"])
    plan = COMMAND.plan(args)
    assert (plan.arms, plan.scale) == (QUICK.arms, QUICK.scale)
    [run] = plan.reported_runs("sft", "facts", 1e-4)
    assert (run.model, run.device, run.origin.model) == ("Qwen/Qwen3-0.6B", "cuda", "Qwen/Qwen3-0.6B")
    [same] = QUICK.reported_runs("sft", "facts", 1e-4)
    assert run.settings() != same.settings()
    assert COMMAND.plan(COMMAND.parser().parse_args([])) == FULL


@pytest.mark.parametrize("change", [{"steps": 1}, {"batch_size": 1}, {"settings": {"divergence": "jsd"}}])
def test_a_result_is_of_its_settings(change):
    arm = ARMS["opsd_forward_kl"]
    runs = [RealRun(PARTS["facts"], 1, its, 1e-4) for its in (arm, replace(arm, **change))]
    assert runs[0].settings() != runs[1].settings()
    assert runs[0].settings() == RealRun(PARTS["facts"], 1, replace(arm, title="other"), 1e-4).settings()


def test_a_result_is_of_the_length_of_its_rollouts(monkeypatch):
    run = RealRun(PARTS["facts"], 1, ARMS["sdft"], 1e-4)
    before = run.settings()
    monkeypatch.setattr("trl_opsd.real_model.arms.ROLLOUT_TOKENS", 24)
    assert run.settings() != before


@pytest.mark.parametrize(("plan", "limit"), [(FULL, 8.0), (QUICK, 25 / 60)], ids=["full", "quick"])
def test_the_plans_are_within_their_budgets(plan, limit):
    seconds = sum(seconds for _, seconds in planned_seconds(plan).values())
    assert seconds / 3600 / PROCESSES <= limit
