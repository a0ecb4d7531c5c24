import json
import os
from pathlib import Path

import psutil
import pytest

from trl_opsd.bench.runner import Contenders, Row


@pytest.fixture
def path(monkeypatch):
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))


@pytest.fixture
def case(tmp_path):
    return {"journal": str(tmp_path / "journal.txt")}


@pytest.fixture
def run(path, case, tmp_path):
    def run(names, timeout=None, **kwargs):
        with Contenders("fakes:serve", names, tmp_path / "logs", timeout=timeout) as contenders:
            return contenders.run_case(case, **{"repeats": 3, **kwargs})

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
    assert [row.facts["first_seconds"] for row in rows] == [0.0, 0.0]
    assert not any(row.alone for row in rows)
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
        (
            "greedy",
            1,
            "failed after 1 timed iterations: OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB",
        ),
        ("killed", 1, "failed after 1 timed iterations: its process was ended by SIGKILL, as when memory runs out"),
    ],
)
def test_the_others_go_on(run, name, timed, error):
    first, failed, last = run(["a", name, "b"])[0]

    assert failed.error == error
    assert failed.no_memory == failed.lacked_memory() == (name == "greedy")
    assert len(failed.samples) == timed
    assert failed.median() is None
    for row in (first, last):
        assert row.error is None
        assert row.median() == 2.0
        assert row.facts["peak_extra_bytes"] == 3


def test_out_of_time(path, case, tmp_path):
    with Contenders("fakes:serve", ["a", "slow", "b"], tmp_path / "logs", timeout=300.0) as contenders:

        def hurry(rows, order):
            contenders._processes["slow"]._left = 0.5

        first, slow, last = contenders.run_case(case, repeats=3, on_round=hurry)[0]
        assert contenders._processes["a"]._left < 300.0

    assert slow.error == "failed after 1 timed iterations: it had not finished after `timeout=300` seconds"
    assert first.median() == last.median() == 2.0


def test_processes_stay_from_case_to_case(path, case, tmp_path):
    names = ["a", "unable", "broken", "greedy", "raising"]
    with Contenders("fakes:serve", names, tmp_path / "logs") as contenders:
        cases = [{row.contender: row for row in contenders.run_case(case, repeats=2)[0]} for _ in range(2)]
        logs = {name: (tmp_path / "logs" / f"{name}.log").read_text() for name in names}
    for rows in cases:
        assert rows["a"].median() == 1.5
        assert rows["unable"].error == "does not run here: it cannot do that"
        assert rows["raising"].error == "failed after 1 timed iterations: ValueError: out of luck"
    # What an error may have left behind goes with its process, and a full memory is emptied
    same = {name: cases[0][name].facts["pid"] == cases[1][name].facts["pid"] for name in ("a", "greedy", "raising")}
    assert same == {"a": True, "greedy": True, "raising": False}
    assert logs["raising"].count("ValueError: out of luck") == 2


def test_what_was_compiled_for_a_case_is_forgotten(path, case, tmp_path):
    with Contenders("fakes:serve", ["compiling"], tmp_path / "logs") as contenders:
        facts = [contenders.run_case(case, repeats=1)[0][0].facts for _ in range(2)]
    assert facts[0]["pid"] == facts[1]["pid"]
    assert [fact["compiled"] for fact in facts] == [1, 2]


def test_what_was_measured_is_told_after_every_round(run):
    told = []
    run(["a", "raising"], on_round=lambda rows, order: told.append(([len(row.samples) for row in rows], len(order))))
    assert told == [([1, 1], 2), ([2, 1], 3), ([3, 1], 4)]


def test_a_single_contender_is_alone(run):
    [row], _ = run(["a"])
    assert row.alone


def test_an_unknown_factory_is_a_reason(tmp_path):
    with Contenders("trl_opsd.bench.loss:nothing", ["a"], tmp_path) as contenders:
        [row], _ = contenders.run_case({}, repeats=1)
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
    with Contenders("trl_opsd.bench.loss:serve", ["floor"], tmp_path, threads=2) as contenders:
        [row], _ = contenders.run_case(settings, repeats=1)
    assert row.facts["threads"] == 2


def test_a_row_is_json():
    row = Row("a", [{"seconds": 1.0}, {"seconds": 4.0}, {"seconds": 2.0}])
    assert row.median() == 2.0
    assert json.loads(json.dumps(row.samples)) == row.samples
