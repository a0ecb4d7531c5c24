"""What is set for all arms alike, and what is planned."""

from dataclasses import replace

import pytest

from trl_opsd.experiment.arms import TUNING_SEED
from trl_opsd.experiment.runner import PROCESSES, planned_seconds
from trl_opsd.real_model.__main__ import COMMAND
from trl_opsd.real_model.arms import ARMS, FULL, PARTS, QUICK, RealRun


TRAINED = [arm for arm in ARMS.values() if arm.trainer != "none"]


def of(part):
    return [arm for arm in ARMS.values() if arm.bases == (part,)]


def test_every_divergence_is_there_with_and_without_clip():
    opsd = [arm.settings for arm in of("facts") if arm.trainer == "opsd"]
    assert sorted((its["divergence"], its["divergence_clip"] is None) for its in opsd) == [
        (divergence, clip) for divergence in ("forward_kl", "jsd", "reverse_kl") for clip in (False, True)
    ]
    assert {arm.column for arm in of("facts") if arm.trainer == "trl_sft"} == {"solution", "teacher", "mixsd"}
    assert {arm.trainer for arm in of("facts")} == {"none", "trl_sft", "sdft", "opsd"}


def test_brevity_is_asked_for_taught_and_imitated():
    assert {arm.trainer for arm in of("brevity")} == {"none", "trl_sft", "opsdc"}
    assert [arm.column for arm in of("brevity") if arm.trainer == "trl_sft"] == ["teacher"]
    assert ARMS["opsdc_frozen"].settings["teacher"] == "initial"


def test_a_skill_is_learnt_by_every_kind_and_controlled():
    assert {arm.trainer for arm in of("skill")} == {"none", "trl_sft", "trl_grpo", "opsd", "star"}
    opsd, control = (ARMS[name].settings for name in ("skill_opsd", "skill_opsd_other"))
    assert {name for name in opsd if opsd[name] != control[name]} == {"privileged_context", "context_kwargs"}
    assert opsd["context_kwargs"]["template"] == control["context_kwargs"]["template"]


def test_trained_arms_of_a_part_have_the_same_budget_and_are_tuned_alike():
    for part in PARTS:
        its = [arm for arm in of(part) if arm.trainer != "none" and arm.name != "sft_short"]
        assert len({(arm.steps, arm.batch_size, arm.evaluate_every) for arm in its}) == 1
    for arm, base in FULL.pairs():
        runs = FULL.tuning_runs(arm, base)
        assert {run.arm.name for run in runs} <= {ARMS[arm].tuned_as or arm}
        rates = list(PARTS[base].learning_rates) if ARMS[arm].trainer != "none" else []
        assert [run.learning_rate for run in runs] == rates
        assert {run.seed for run in runs} <= {TUNING_SEED}
        assert QUICK.tuning_runs(arm, base) == []
    assert TUNING_SEED not in FULL.seeds
    assert len(FULL.seeds) >= 3


def test_sft_is_also_stopped_early():
    whole, short = ARMS["sft"], ARMS["sft_short"]
    assert short.steps == pytest.approx(whole.steps / 4, abs=0.5)
    for name in ("trainer", "bases", "settings", "batch_size", "column"):
        assert getattr(short, name) == getattr(whole, name)


def test_a_variant_takes_the_rate_of_what_it_varies():
    tuned = {arm.name: ARMS[arm.tuned_as] for arm in ARMS.values() if arm.tuned_as}
    assert len(tuned) == 9
    for name, other in tuned.items():
        # STaR is SFT on answers of its own
        trainer = "trl_sft" if ARMS[name].trainer == "star" else ARMS[name].trainer
        assert (other.trainer, other.bases, other.tuned_as) == (trainer, ARMS[name].bases, None)


def test_whoever_reads_reads_the_same():
    for part in PARTS.values():
        readers = [arm for arm in of(part.name) if arm.trainer in ("sdft", "opsd", "opsdc", "star")]
        readers += [arm for arm in of(part.name) if arm.name.endswith("told")]
        assert all(arm.settings.items() >= part.reads.items() for arm in readers if arm.name != "skill_opsd_other")
        assert not next(arm for arm in of(part.name) if arm.name.endswith("floor")).settings


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


def test_a_result_is_of_what_its_part_says():
    part = PARTS["facts"]
    longer = replace(part, settings=part.settings | {"rollout_tokens": 24}, seconds=0.0)
    runs = [RealRun(its, 1, ARMS["sdft"], 1e-4) for its in (part, replace(part, seconds=0.0), longer)]
    assert runs[0].settings() == runs[1].settings() != runs[2].settings()


def test_results_of_another_model_go_elsewhere():
    def places(*argv):
        return [str(path) for path in COMMAND.places(COMMAND.parser().parse_args(argv))]

    assert places() == ["docs/real_model", "docs/real_model.md"]
    assert places("--quick") == ["outputs/real-quick", "outputs/real-quick/real_model.md"]
    other = "outputs/real-Qwen3-0.6B-cuda"
    assert places("--model", "Qwen/Qwen3-0.6B", "--device", "cuda") == [other, f"{other}/real_model.md"]
    assert places("--device", "cuda", "--output_dir", "x") == ["x", "x/real_model.md"]


@pytest.mark.parametrize(("plan", "limit"), [(FULL, 8.0), (QUICK, 25 / 60)], ids=["full", "quick"])
def test_the_plans_are_within_their_budgets(plan, limit):
    seconds = sum(seconds for _, seconds in planned_seconds(plan).values())
    assert seconds / 3600 / PROCESSES <= limit
