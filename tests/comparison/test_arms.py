"""What is set for all alike, and that methods come in by themselves."""

import pytest
import yaml

from trl_opsd.comparison import arms
from trl_opsd.comparison.arms import ARMS, FULL, QUICK, Family, family_of, make_arms
from trl_opsd.experiment.arms import TUNING_SEED
from trl_opsd.experiment.runner import PROCESSES, planned_seconds
from trl_opsd.files import recipes_folder
from trl_opsd.methods import METHODS
from trl_opsd.playground.demo import SHORTENING


TRAINED = [arm for arm in ARMS.values() if arm.trainer != "none"]
CONTROLS = {
    "opsd_none": ("opsd", "none"),
    "opsd_other_solution": ("opsd", "other_solution"),
    "opsd_shuffled_solution": ("opsd", "shuffled_solution"),
    "opsdc_none": ("opsdc", "none"),
}


def test_all_methods_the_controls_and_trls_trainers_are_compared():
    assert set(FULL.arms) == set(ARMS) == {*METHODS, *CONTROLS, "grpo", "sft", "told"}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_what_its_recipe_says(method):
    recipe = yaml.safe_load((recipes_folder() / "playground" / f"{method}.yaml").read_text())
    arm = ARMS[method]
    assert arm.trainer == method
    assert arm.settings.items() <= recipe.items()
    assert "trl_opsd.playground.world.accuracy_reward" in arm.settings["reward_funcs"]
    assert arm.bases == (("verbose",) if method in SHORTENING else ("middling",))
    alike = {"learning_rate", "max_steps", "per_device_train_batch_size", "max_completion_length", "output_dir"}
    assert recipe.keys() >= alike
    assert not arm.settings.keys() & alike


def test_a_new_method_joins_by_its_recipe_and_is_refused_by_name_without(tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "METHODS", {**METHODS, "newcomer": "newcomer.NewcomerConfig"})
    with pytest.raises(ValueError, match=r"`newcomer` has no recipe .* write recipes/playground/newcomer\.yaml"):
        make_arms()
    (tmp_path / "playground").mkdir()
    for method in METHODS:
        name = f"playground/{method}.yaml"
        (tmp_path / name).write_text((recipes_folder() / name).read_text())
    (tmp_path / "playground/newcomer.yaml").write_text("learning_rate: 1.0\nteacher: live\n")
    monkeypatch.setattr(arms, "recipes_folder", lambda: tmp_path)
    newcomer = make_arms()["newcomer"]
    assert (newcomer.trainer, newcomer.settings, newcomer.bases) == ("newcomer", {"teacher": "live"}, ("middling",))
    assert newcomer.tokens == ARMS["opsd"].tokens


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_differs_in_what_the_teacher_reads(name):
    method, context = CONTROLS[name]
    control, parent = ARMS[name], ARMS[method]
    assert control.settings["privileged_context"] == context != parent.settings["privileged_context"]
    differing = {
        key
        for key in control.settings.keys() | parent.settings.keys()
        if control.settings.get(key) != parent.settings.get(key)
    }
    assert differing == {"privileged_context"} | ({"context_kwargs"} if context == "none" else set())
    assert (control.trainer, control.bases) == (parent.trainer, parent.bases)


def test_all_trained_arms_have_the_same_budget_and_are_tuned_alike():
    assert {(arm.tokens, arm.batch_size, arm.steps, arm.evaluate_every, arm.constant_rate) for arm in TRAINED} == {
        (ARMS["opsd"].tokens, 64, ARMS["opsd"].steps, ARMS["opsd"].evaluate_every, False)
    }
    for arm, base in FULL.pairs():
        runs = FULL.tuning_runs(arm, base)
        assert [run.learning_rate for run in runs] == ([] if arm == "told" else list(FULL.learning_rates))
        assert {(run.seed, run.arm and run.arm.name) for run in runs} <= {(TUNING_SEED, arm)}
    assert len(FULL.seeds) >= 3
    assert TUNING_SEED not in FULL.seeds
    assert {base for arm, base in FULL.pairs() if arm == "grpo"} == {"middling", "verbose"}


def test_families_follow_from_the_configuration():
    assert family_of(ARMS["opsd"]) == Family("divergence", "the reference")
    assert family_of(ARMS["opsdc"]) == Family("divergence", "an instruction")
    assert family_of(ARMS["sdpo"]) == Family("divergence", "rollouts")
    assert family_of(ARMS["rlrt"]) == Family("policy gradient", "rollouts")
    assert family_of(ARMS["star"]) == Family("likelihood", "the reference")
    assert family_of(ARMS["grpo"]) == Family("policy gradient", "nothing")
    assert family_of(ARMS["sft"]) == Family("likelihood", "the reference")
    reads = {name: family_of(ARMS[name]).reads for name in CONTROLS}
    assert list(reads.values()) == ["nothing", "another's reference", "a shuffled reference", "nothing"]
    assert all(family_of(arm).loss for arm in ARMS.values())


def hours(plan):
    return sum(seconds for _, seconds in planned_seconds(plan).values()) / PROCESSES / 3600


def test_the_plans_are_within_their_budgets():
    assert hours(FULL) <= 6.0
    assert hours(QUICK) <= 1 / 3


def test_the_quick_plan_is_small_and_has_one_of_each_kind():
    assert len(QUICK.arms) <= 10
    assert len(QUICK.learning_rates) == 1
    assert not any(QUICK.tuning_runs(*pair) for pair in QUICK.pairs())
    assert {"grpo", "sft", "opsd", "opsd_none", "opsdc"} <= set(QUICK.arms)
    losses = {family_of(ARMS[arm]).loss for arm in QUICK.arms if arm in METHODS}
    assert losses == {"divergence", "policy gradient", "likelihood"}
