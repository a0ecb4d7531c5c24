import json
import sys
from dataclasses import replace

import pytest
from rich.console import Console
from study.made import run_of

from trl_opsd.experiment import runner
from trl_opsd.experiment.arms import BASES, TUNING_SEED
from trl_opsd.experiment.runner import Plan, Results, execute_in_process, planned_seconds, run_plan
from trl_opsd.experiment.train import write_result
from trl_opsd.study.arms import ARMS, FULL, LEARNING_RATES, QUICK, SEEDS


PLAN = Plan(
    ARMS,
    seeds=(1, 2),
    learning_rates=(1e-4, 1e-3),
    arms=("sft", "opsd", "opsd_long"),
    bases=("weak", "middling"),
)


def name_of(run):
    return run.arm and run.arm.name


def result_of(run, accuracy=0.5):
    figures = {"accuracy": accuracy, "mean_tokens": 30.0}
    return {"settings": run.settings(), "final": {"test": figures, "tune": figures}, "cpu_seconds": 1.0}


class Execute:
    """Stands in for the process of a run."""

    def __init__(self, fails=(), accuracy=lambda run: 0.5, interrupt_at=None):
        self.ran, self.fails, self.accuracy, self.interrupt_at = [], fails, accuracy, interrupt_at

    def __call__(self, run, path):
        if len(self.ran) == self.interrupt_at:
            raise KeyboardInterrupt
        self.ran.append(run)
        if run.arm is None:
            (path.parents[1] / "bases" / run.base.name).mkdir(parents=True, exist_ok=True)
        failed = {"settings": run.settings(), "error": "ValueError: no"}
        write_result(path, failed if run.name in self.fails else result_of(run, self.accuracy(run)))


def study(folder, execute, plan=PLAN, **kwargs):
    console = Console(record=True, width=200, force_terminal=False)
    return run_plan(plan, folder, console=console, execute=execute, **kwargs), console.export_text()


def test_a_study_runs_bases_tuning_and_seeds_and_nothing_twice(tmp_path):
    execute = Execute()
    study(tmp_path, execute)
    ran = execute.ran
    rates = PLAN.learning_rates
    expected = [run_of("weak"), run_of("middling")]
    for arm in ("sft", "opsd"):
        for base in ("weak", "middling"):
            expected += [run_of(base, TUNING_SEED, arm, rate) for rate in rates]
            expected += [run_of(base, seed, arm, 1e-4) for seed in (1, 2)]
    expected += [run_of("middling", seed, "opsd_long", 1e-4) for seed in (1, 2)]
    assert set(ran) == set(expected)
    assert len(ran) == len(expected)
    for arm in ("sft", "opsd"):  # no reported run before all of its tuning
        for base in ("weak", "middling"):
            order = [run.seed for run in ran if (name_of(run), run.base.name) == (arm, base)]
            assert order[:2] == [TUNING_SEED, TUNING_SEED]
    assert {name_of(run) for run in ran[2:10]} >= {"sft"}
    assert {name_of(run) for run in ran[-2:]} == {"opsd_long"}

    again = Execute()
    study(tmp_path, again)
    assert again.ran == []


def test_an_interrupted_study_goes_on_where_it_stopped(tmp_path):
    first = Execute(interrupt_at=9)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, first)
    second = Execute()
    study(tmp_path, second)
    assert not set(first.ran) & set(second.ran)
    assert len(first.ran) + len(second.ran) == 20


def failures(results):
    return {run.name: left["error"] for run, left in results.all(PLAN).items() if "error" in left}


def test_failed_runs_are_reported_and_run_again(tmp_path):
    name = run_of("weak", 1, "sft", 1e-4).name
    results, output = study(tmp_path, Execute(fails=(name,)))
    assert f"{name} failed: ValueError: no" in output
    assert failures(results) == {name: "ValueError: no"}
    assert set(results.reported(PLAN, "sft", "weak")) == {2}

    again = Execute()
    results, _ = study(tmp_path, again)
    assert [run.name for run in again.ran] == [name]
    assert failures(results) == {}
    assert set(results.reported(PLAN, "sft", "weak")) == {1, 2}


def test_what_failed_in_arms_that_are_not_run_stays(tmp_path):
    name = run_of("weak", 1, "sft", 1e-4).name
    study(tmp_path, Execute(fails=(name,)))
    results, _ = study(tmp_path, Execute(), replace(PLAN, arms=("opsd",)))
    assert failures(results) == {name: "ValueError: no"}


def test_a_file_that_was_cut_off_is_made_again(tmp_path):
    results, _ = study(tmp_path, Execute())
    run = run_of("weak", 1, "sft", 1e-4)
    results.path(run).write_text(results.path(run).read_text()[:20])
    again = Execute()
    study(tmp_path, again)
    assert again.ran == [run]


def test_weights_of_a_base_that_are_gone(tmp_path):
    study(tmp_path, Execute())
    (tmp_path / "bases/weak").rmdir()
    with pytest.raises(ValueError, match="what it made is not"):
        study(tmp_path, None)


def test_one_study_at_a_time(tmp_path):
    class Second(Execute):
        def __call__(self, run, path):
            with pytest.raises(ValueError, match="Another run works in"):
                study(tmp_path, None)
            super().__call__(run, path)

    second = Second()
    study(tmp_path, second)
    assert len(second.ran) == 20


def test_arms_at_the_same_rate_share_their_runs(tmp_path):
    plan = Plan(
        ARMS, seeds=(1,), learning_rates=(1e-4, 1e-3), arms=("opsdc_50", "opsdc_1", "opsdc_1_same"), bases=("verbose",)
    )
    execute = Execute()
    results, _ = study(tmp_path / "equal", execute, plan)
    names = [name_of(run) for run in execute.ran if run.seed == 1]
    assert sorted(names) == ["opsdc_1", "opsdc_50"]
    (run,) = results.reported(plan, "opsdc_1_same", "verbose").values()
    assert run["settings"]["run"]["arm"] == "opsdc_1"

    execute = Execute(accuracy=lambda run: 0.9 if (name_of(run), run.learning_rate) == ("opsdc_50", 1e-3) else 0.5)
    results, _ = study(tmp_path / "other", execute, plan)
    rates = sorted(run.learning_rate for run in execute.ran if run.seed == 1 and name_of(run) == "opsdc_1")
    assert rates == [1e-4, 1e-3]
    (run,) = results.reported(plan, "opsdc_1_same", "verbose").values()
    assert run["settings"]["run"]["learning_rate"] == 1e-3


def test_what_rests_on_a_failed_base_is_left_out(tmp_path):
    execute = Execute(fails=("weak",))
    results, _ = study(tmp_path, execute)
    assert not any(run.base.name == "weak" and run.arm for run in execute.ran)
    assert set(results.reported(PLAN, "opsd", "middling")) == {1, 2}
    assert results.reported(PLAN, "opsd", "weak") == {}


def test_a_result_of_other_settings_is_made_again(tmp_path, monkeypatch):
    study(tmp_path, Execute())
    monkeypatch.setitem(ARMS, "sft", replace(ARMS["sft"], steps=99, title="Another title"))
    again = Execute()
    study(tmp_path, again)
    assert {name_of(run) for run in again.ran} == {"sft"}
    assert len(again.ran) == 8
    monkeypatch.setitem(ARMS, "sft", replace(ARMS["sft"], title="Yet another", seconds=9.0))
    again = Execute()
    study(tmp_path, again)
    assert again.ran == []


def test_the_best_rate_is_taken_and_the_tuning_seed_is_not_reported(tmp_path):
    results, _ = study(tmp_path, Execute(accuracy=lambda run: 0.9 if run.learning_rate == 1e-3 else 0.4))
    assert results.learning_rate(PLAN, "opsd", "middling") == 1e-3
    assert results.learning_rate(PLAN, "opsd_long", "middling") == 1e-3
    # Tuning does not look at what is reported
    assert results.score(run_of("middling", TUNING_SEED, "opsd", 1e-3)) == 0.9
    assert set(results.reported(PLAN, "opsd_long", "middling")) == {1, 2}
    assert TUNING_SEED not in SEEDS


def test_of_equal_rates_the_lower_one_is_taken(tmp_path):
    results, _ = study(tmp_path, Execute())
    assert results.learning_rate(PLAN, "sft", "weak") == 1e-4


def test_an_arm_whose_tuning_failed_altogether_is_not_run(tmp_path):
    fails = [run_of("weak", 0, "sft", rate).name for rate in PLAN.learning_rates]
    execute = Execute(fails=fails)
    results, _ = study(tmp_path, execute)
    assert results.learning_rate(PLAN, "sft", "weak") is None
    assert not any(name_of(run) == "sft" and run.base.name == "weak" and run.seed for run in execute.ran)


def test_opsdc_is_tuned_for_accuracy_less_length(tmp_path):
    results = Results(tmp_path)
    base, run = run_of("verbose"), run_of("verbose", 0, "opsdc_50", 1e-4)
    write_result(results.path(base), result_of(base))
    shorter = result_of(run, 0.4)
    shorter["final"]["tune"] = {"accuracy": 0.4, "mean_tokens": 15.0}
    write_result(results.path(run), shorter)
    assert results.score(run) == pytest.approx(0.4 - 0.5)


def test_no_run_is_started_after_the_hours_are_over(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 600))  # ten minutes pass between two looks
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(clock))
    execute = Execute()
    study(tmp_path, execute, max_hours=0.6)
    assert 1 <= len(execute.ran) <= 3


def test_a_process_that_dies_leaves_its_status(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    run = run_of("weak")
    path = Results(tmp_path).path(run)
    execute_in_process(run, path)
    assert "ended with status 1" in json.loads(path.read_text())["error"]
    assert Results(tmp_path).complete(run) is None


def test_a_result_is_written_in_one_piece(tmp_path):
    path = tmp_path / "runs" / "a.json"
    write_result(path, {"a": 1})
    with pytest.raises(TypeError):
        write_result(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_the_studies_are_within_their_budgets():
    def hours(plan):
        return sum(seconds for _, seconds in planned_seconds(plan).values()) / runner.PROCESSES / 3600

    assert hours(FULL) <= 4.0
    assert hours(QUICK) <= 1 / 3
    assert len(FULL.seeds) >= 3
    assert FULL.learning_rates == LEARNING_RATES
    assert set(FULL.arms) == set(ARMS)
    assert set(FULL.bases) == set(BASES)


def test_names_tell_runs_apart():
    runs = [*FULL.base_runs()]
    for arm, base in FULL.pairs():
        runs += [*FULL.tuning_runs(arm, base), *FULL.reported_runs(arm, base, 3e-4), run_of(base, 1, arm, 3e-4, 0.5)]
    assert len({run.name for run in set(runs)}) == len(set(runs))
