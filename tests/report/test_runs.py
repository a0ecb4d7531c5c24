"""What is read of a run's folder, and what is refused."""

import json
import os
import shutil

import pytest
from report.made import make_run, session, steps

from trl_opsd.report.runs import read_runs


def read(folder):
    [run] = read_runs([folder])
    return run


def test_the_log_and_what_the_run_was(tmp_path):
    folder = make_run(tmp_path / "run", steps(1.0, 0.5), max_steps=4, sessions=[session()])
    run = read(folder)
    assert (run.name, run.step, run.max_steps, run.is_finished) == ("run", 2, 4, False)
    assert run.series("loss") == ([1, 2], [1.0, 0.5])
    assert run.last("entropy") == 0.5
    assert run.method["name"] == "OPSD"
    assert run.summary == [("student", "tiny")]
    assert run.sessions[0].settings["teacher"] == "initial"


def test_only_numbers_are_drawn(tmp_path):
    log = [{"step": 1, "a": 1, "b": None, "c": "x", "d": True, "e": float("nan")}]
    run = read(make_run(tmp_path / "run", log))
    assert {name: run.series(name)[1] for name in "abcde"} == {"a": [1], "b": [], "c": [], "d": [], "e": []}


def test_newest_checkpoint_has_the_log_of_a_run_that_keeps_none_itself(tmp_path):
    for number in (2, 10):
        make_run(tmp_path / "run" / f"checkpoint-{number}", steps(*[1.0] * number))
    assert read(tmp_path / "run").step == 10
    assert read(tmp_path / "run" / "checkpoint-2").step == 2
    make_run(tmp_path / "new", steps(1.0))
    shutil.copy(tmp_path / "new" / "trainer_state.json", tmp_path / "run")  # it has been begun anew
    assert read(tmp_path / "run").step == 1


def test_a_checkpoint_belongs_to_the_run_around_it(tmp_path):
    folder = make_run(tmp_path / "run", steps(1.0), sessions=[session()])
    make_run(folder / "checkpoint-1", steps(1.0))
    assert read(folder / "checkpoint-1").sessions[0].step == 0


def test_a_run_that_has_not_logged_yet(tmp_path):
    folder = make_run(tmp_path / "run", [], sessions=[session()])
    (folder / "trainer_state.json").unlink()
    run = read(folder)
    assert (run.log, run.written, run.is_finished) == ([], None, False)


def test_evaluations(tmp_path):
    folder = make_run(tmp_path / "run", steps(1.0))
    for name in ("eval/step-0", "eval/step-50", "eval/step-100", "eval/again", "other"):
        (folder / name).mkdir(parents=True)
        (folder / name / "run.json").write_text("{}")
    run = read(folder)
    assert list(run.evaluations) == [0, 50, 100]
    assert [path.name for path in run.later_evaluations] == ["other", "again"]


def test_names_tell_runs_apart(tmp_path):
    a, b = (make_run(tmp_path / name / "model", steps(1.0)) for name in ("seed0", "seed1"))
    assert [run.name for run in read_runs([a, b])] == ["seed0/model", "seed1/model"]
    with pytest.raises(ValueError, match=r"seed0.model is named twice"):
        read_runs([a, a / ".." / "model"])


def test_pages_of_inspected_rollouts_are_in_order(tmp_path):
    folder = make_run(tmp_path / "run", steps(1.0))
    (folder / "inspect").mkdir()
    for step in (5, 10, 100):
        (folder / "inspect" / f"step-{step}.html").touch()
    assert [file.name for file in read(folder).inspected] == ["step-5.html", "step-10.html", "step-100.html"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "trainer_state.json is not JSON"),
        ("[]", "holds list, not an object"),
        ("{}", "no `log_history`.*by a version of it that is not known here"),
        ('{"log_history": [{"loss": 1.0}]}', "of entries with a `step`"),
    ],
)
def test_logs_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_a_record_of_another_version(tmp_path):
    folder = make_run(tmp_path / "run", steps(1.0), sessions=[session()])
    record = json.loads((folder / "training_run.json").read_text())
    record["sessions"][0].pop("devices")
    (folder / "training_run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"training_run.json was written by another version.*devices"):
        read(folder)


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(ValueError, match=r"is no folder\. Name the `output_dir`"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds neither training_run.json nor trainer_state.json.*with one\.$"):
        read(tmp_path)
    make_run(tmp_path / "model", steps(1.0))
    with pytest.raises(ValueError, match=rf"Did you mean {tmp_path}{os.sep}model\?"):
        read(tmp_path)
    (tmp_path / "run.json").touch()
    with pytest.raises(ValueError, match="It is an evaluation: see `--eval`"):
        read(tmp_path)
