import json
import os
from pathlib import Path

import psutil
import pytest

from trl_opsd.bench.runner import Row, run_case


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])]))
    case = {"journal": str(tmp_path / "journal.txt")}

    def run(contenders, **kwargs):
        return run_case("fakes:serve", contenders, case, tmp_path / "logs", **{"repeats": 3, **kwargs})

    return run


def journal(tmp_path):
    return (tmp_path / "journal.txt").read_text().splitlines()


def test_contenders_take_turns(run, tmp_path):
    rows, order = run(["a", "b"], warmups=2)

    commands = [*["warmup"] * 2, *["time"] * 3, "memory"]
    turns = [f"{command} {name}" for command in commands for name in "ab"]
    assert journal(tmp_path) == [f"{turn} {moment}" for turn in turns for moment in ("begins", "ends")]
    assert order == ["a", "b"] * 3
    assert [sample["seconds"] for sample in rows[0].samples] == [1.0, 2.0, 3.0]
    assert [row.median() for row in rows] == [2.0, 2.0]
    assert [row.facts["peak_extra_bytes"] for row in rows] == [3, 3]
    assert len({row.facts["pid"] for row in rows} | {os.getpid()}) == 3
    assert not any(psutil.pid_exists(row.facts["pid"]) for row in rows)


def test_what_a_library_prints_is_no_answer(run, tmp_path):
    run(["a"])
    assert (tmp_path / "logs" / "a.log").read_text() == "a library says hello\n"


@pytest.mark.parametrize(
    ("name", "timed", "error"),
    [
        ("unable", 0, "does not run here: it cannot do that"),
        ("broken", 0, "does not run here: RuntimeError: no such kernel"),
        ("raising", 1, "failed after 1 timed iterations: ValueError: out of luck"),
        ("killed", 1, "failed after 1 timed iterations: its process was ended by SIGKILL, as when memory runs out"),
    ],
)
def test_the_others_go_on(run, name, timed, error):
    first, failed, last = run(["a", name, "b"])[0]

    assert failed.error == error
    assert len(failed.samples) == timed
    assert failed.median() is None
    for row in (first, last):
        assert row.error is None
        assert row.median() == 2.0
        assert row.facts["peak_extra_bytes"] == 3


def test_an_unknown_factory_is_a_reason(tmp_path):
    [row], _ = run_case("trl_opsd.bench.loss:nothing", ["a"], {}, tmp_path, repeats=1)
    assert row.error.startswith("does not run here: AttributeError")


def test_nothing_outlives_an_interruption(run):
    seen = []

    def interrupt(phase, name):
        seen.extend(psutil.Process().children(recursive=True))
        if phase.startswith("round 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(["a", "b"], on_turn=interrupt)
    assert len({process.pid for process in seen}) == 2
    assert not any(process.is_running() for process in seen)


def test_threads(run, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = {"num_tokens": 2, "hidden_size": 2, "vocab_size": 3, "device": "cpu"}
    [row], _ = run_case("trl_opsd.bench.loss:serve", ["floor"], settings, tmp_path, repeats=1, threads=2)
    assert row.facts["threads"] == 2


def test_a_row_is_json():
    row = Row("a", [{"seconds": 1.0}, {"seconds": 4.0}, {"seconds": 2.0}])
    assert row.median() == 2.0
    assert json.loads(json.dumps(row.samples)) == row.samples
