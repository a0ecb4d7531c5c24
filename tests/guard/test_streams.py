"""The default limits on metrics that were recorded in runs of the study's arms (`python -m trl_opsd.study.guards`)."""

import json
from pathlib import Path

import pytest

from trl_opsd.guard import GUARDS
from trl_opsd.study.guards import (
    COLLAPSING,
    HEAD,
    HEALTHY,
    LOSING,
    SEEDS,
    alarms,
    collapse,
    evaluations,
    main,
    outcome,
    row,
)


RECORDED = json.loads(Path(__file__).with_name("streams.json").read_text(encoding="utf-8"))
# Sags to 70 % by step 18, and falls to 4 % by step 30: what is measured anyway tells too late
LATE = "opsd_live_long-middling-lr0.0003-seed2"
# Falls from 33 to 4 % within 6 steps
SUDDEN = "opsd_clip-middling-lr0.001-seed1"


def recorded(arms):
    """Those of which there is a stream: arm, seed, name."""
    runs = [(watched, seed, watched.name(seed)) for watched in arms for seed in SEEDS]
    return [run for run in runs if run[2] in RECORDED]


def names(arms):
    return [name for _, _, name in recorded(arms)]


def series(name):
    columns = RECORDED[name]["series"]
    steps = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    # Rewards were not recorded to the end of every run
    return [{metric: value for metric, value in step.items() if value is not None} for step in steps]


def curve(name):
    return [{"step": step, "accuracy": accuracy} for step, accuracy in RECORDED[name]["curve"]]


def held_out(name):
    ends = ("", "_low", "_high")
    return [
        {"step": step, **{f"eval_held_out/avg@1{end}": value for end, value in zip(ends, values, strict=True)}}
        for step, *values in RECORDED[name].get("held_out", ())
    ]


@pytest.mark.parametrize("name", names(HEALTHY))
def test_no_false_alarm(name):
    assert alarms(series(name), held_out(name)) == {}


@pytest.mark.parametrize("name", names(COLLAPSING))
def test_collapse_is_seen(name):
    """At most a third later than 10 points are lost."""
    began, _ = collapse(curve(name))
    stop, since = alarms(series(name), held_out(name))["benchmark"]
    assert since <= stop <= began * 4 / 3


def test_of_a_sudden_collapse_the_free_guards_tell_late():
    assert collapse(curve(SUDDEN))[0] == 6
    assert {name: stop for name, (stop, _) in alarms(series(SUDDEN), held_out(SUDDEN)).items()} == {
        "benchmark": 8,
        "divergence": 10,
        "correct": 13,
        "teacher_gap": 13,
    }


@pytest.mark.parametrize("name", names(LOSING))
def test_of_a_slow_loss_evaluations_tell_first(name):
    """Until a refresh of the teacher at step 50 may raise the divergence, nothing else does."""
    (first, _), *others = alarms(series(name), held_out(name)).items()
    assert first == "benchmark"
    assert all(other == "divergence" and stop > 50 for other, (stop, _) in others)


def test_a_lower_limit_of_what_is_right_sees_in_time_that_a_live_teacher_forgets():
    assert {name: stop for name, (stop, _) in alarms(series(LATE)).items()} == {"correct": 30, "divergence": 31}
    guard = GUARDS["correct"](fall=0.15)
    stops = [step for step, its in enumerate(series(LATE), 1) if guard.observe(step, its) and guard.has_trouble]
    assert stops[0] == 22


def test_the_page_shows_what_was_recorded():
    rows = [
        row(watched, seed, {"series": series(name), "held_out": held_out(name), "curve": curve(name)})
        for watched, seed, name in recorded(COLLAPSING + LOSING + HEALTHY)
    ]
    assert len(rows) == len(RECORDED)
    page = (Path(__file__).parents[2] / "docs" / "guards.md").read_text(encoding="utf-8")
    assert "\n".join([HEAD, *rows, ""]) in page


def test_a_collapse_begins_where_ten_points_are_lost():
    curve = [{"step": 10 * index, "accuracy": value} for index, value in enumerate((0.3, 0.8, 0.72, 0.7, 0.9))]
    assert collapse(curve) == (30, 0.8)
    assert collapse(curve[:3]) is None
    assert [outcome(curve[:end]) for end in (3, 4, 5)] == ["never lost", "lost", "regained"]


def test_curves_of_a_comparison(tmp_path, capsys):
    """Every run counts once, by its seed and what became of it; the tuned ones do not."""
    curves = {1: (0.5, 0.9, 0.9, 0.9), 2: (0.5, 0.9, 0.2, 0.2), 3: (0.9, 0.78, 0.78, 0.9), 0: (0.9, 0.2, 0.2, 0.2)}
    for seed, values in curves.items():
        curve = [{"step": 10 * index, "accuracy": value} for index, value in enumerate(values)]
        run = {"settings": {"run": {"seed": seed, "base": "middling"}}, "curve": curve}
        (tmp_path / f"opsd-seed{seed}.json").write_text(json.dumps(run))

    main(["--curves", str(tmp_path)])

    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| `drop` | `patience` | never lost, seed 1 (1) | regained, seed 3 (1) | lost, seed 2 (1) |"
    assert {"| 0.05 | 2 | 0 | 1 | 1 |", "| 0.05 | 3 | 0 | 0 | 1 |"} <= set(rows)


def test_a_curve_is_read_as_evaluations_are_logged():
    [logged] = evaluations([{"step": 3, "accuracy": 0.5}], 100)
    assert (logged["step"], logged["eval_curve/avg@1"]) == (3, 0.5)
    assert logged["eval_curve/avg@1_low"] == pytest.approx(0.404, abs=1e-3)
