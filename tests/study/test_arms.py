"""Arms are compared, so what their trainers are given must differ in what their titles say and in nothing else."""

from types import SimpleNamespace

import pytest
from study.made import run_of

from trl_opsd.experiment import train
from trl_opsd.study.arms import ARMS, FULL


# Arm: the one it is read against, and the settings in which the two differ
DIFFERENCES = {
    "opsd_short": ("opsd", {"max_steps"}),
    "opsd_terse": ("opsd", {"context_kwargs"}),
    "opsd_answer": ("opsd", {"privileged_context", "context_kwargs"}),
    "opsd_live": ("opsd", {"teacher"}),
    "opsd_clip": ("opsd", {"divergence_clip"}),
    "opsd_reverse_kl": ("opsd", {"divergence"}),
    "opsd_jsd": ("opsd", {"divergence"}),
    "opsd_sampled": ("opsd_reverse_kl", {"divergence_support"}),
    "off_policy": ("opsd", {"completions"}),
    "off_policy_terse": ("off_policy", {"context_kwargs"}),
    "opsd_long": ("opsd", {"max_steps", "lr_scheduler_type"}),
    "opsd_live_long": ("opsd_long", {"teacher"}),
    "opsd_clip_long": ("opsd_long", {"divergence_clip"}),
    "opsdc_10": ("opsdc_50", {"teacher_update_steps"}),
    "opsdc_1": ("opsdc_50", {"teacher_update_steps"}),
    "opsdc_frozen": ("opsdc_50", {"teacher", "teacher_update_steps"}),
    "opsdc_forward_kl": ("opsdc_50", {"divergence"}),
    "sft_terse": ("sft", set()),
}
# Of another trainer: the settings that both have are alike
OTHER_TRAINERS = {"sft": set(), "sdft": set(), "grpo": {"max_steps", "per_device_train_batch_size"}}


@pytest.fixture
def settings_of(monkeypatch):
    """What the trainer of an arm's reported run is given."""

    def settings_of(name):
        given = {}

        def make(arm, model, rows, settings):
            given.update(settings)
            return SimpleNamespace(remove_callback=lambda callback: None)

        monkeypatch.setattr(train, "_PEERS", dict.fromkeys(train._PEERS, make))
        monkeypatch.setattr(train, "_self_distillation", make)
        [run, *_] = FULL.reported_runs(name, ARMS[name].bases[-1], 1e-4)
        assert run == run_of(run.base.name, FULL.seeds[0], ARMS[name].trained_as or name, 1e-4)
        train.make_trainer(run, "model", None, "out")
        return given

    return settings_of


def test_no_arm_is_without_its_comparison():
    trained = {arm.name for arm in ARMS.values() if arm.trainer != "none" and arm.trained_as is None}
    assert trained == {*DIFFERENCES, *OTHER_TRAINERS, "opsd", "opsdc_50"}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_an_arm_differs_in_what_it_is_about(settings_of, name):
    other, expected = DIFFERENCES[name]
    its, others = settings_of(name), settings_of(other)
    assert {key for key in its.keys() | others.keys() if its.get(key) != others.get(key)} == expected
    assert (ARMS[name].column == ARMS[other].column) == (name != "sft_terse")
    assert set(ARMS[name].bases) <= set(ARMS[other].bases)


@pytest.mark.parametrize("name", OTHER_TRAINERS)
def test_other_trainers_share_what_they_can(settings_of, name):
    its, opsd = settings_of(name), settings_of("opsd")
    assert {key for key in its.keys() & opsd.keys() if its[key] != opsd[key]} == OTHER_TRAINERS[name]
    assert ARMS[name].bases == ARMS["opsd"].bases


def test_grpo_is_given_the_sequences_that_the_report_says(settings_of):
    sequences = {
        name: settings["max_steps"] * settings["per_device_train_batch_size"]
        for name in ("grpo", "opsd")
        if (settings := settings_of(name))
    }
    assert sequences["grpo"] == 4 * sequences["opsd"]


def test_an_arm_takes_its_rate_from_one_that_is_tuned_on_the_same_base():
    for arm, base in FULL.pairs():
        tuned = ARMS[arm].tuned_as
        assert tuned is None or ((tuned, base) in FULL.pairs() and ARMS[tuned].tuned_as is None)


def test_an_arm_that_is_another_at_another_rate_has_a_rate_of_its_own():
    for arm in ARMS.values():
        if arm.trained_as is not None:
            assert arm.tuned_as not in (None, arm.trained_as)
            assert arm.bases == ARMS[arm.trained_as].bases
            assert not arm.settings  # they are the other's
