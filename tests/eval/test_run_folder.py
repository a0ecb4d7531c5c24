import json
import resource
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
from eval.made import make_sample
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_opsd.eval.run_folder import SampleFile, keep_problems, open_run, read_samples, write_json
from trl_opsd.eval.samples import Sample


SAMPLE = Sample("mine", "p", 0, 1, "text", 3, True, "2", True, "2", "boxed")


def samples(count, text="text"):
    return [replace(SAMPLE, sample_index=index, completion=f"{text} {index}") for index in range(count)]


def read(path):
    file = SampleFile(path)
    file.close()
    return file.samples


def fill(path, rows):
    file = SampleFile(path)
    for row in rows:
        file.append(row)
    file.close()


@settings(max_examples=50)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5), st.integers(min_value=0))
def test_a_file_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, texts, cut):
    path = tmp_path_factory.mktemp("run") / "samples.jsonl"
    rows = [replace(SAMPLE, sample_index=index, completion=text) for index, text in enumerate(texts)]
    fill(path, rows)
    content = path.read_bytes()[: cut % (path.stat().st_size + 1)]
    path.write_bytes(content)

    kept = read(path)

    assert kept == rows[: content.count(b"\n")]
    fill(path, rows[len(kept) :])
    assert read(path) == rows


def test_each_sample_is_on_disk_at_once(tmp_path):
    file = SampleFile(tmp_path / "samples.jsonl")
    for count, row in enumerate(samples(3), 1):
        file.append(row)
        assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == count
    file.close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "line 2: "),
        ("half a li", "line 2: "),
        (json.dumps(vars(SAMPLE)), "Line 2 of .* sample 0 of problem p a second time"),
    ],
)
def test_damaged_files_are_refused(line, message, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(f"{json.dumps(vars(SAMPLE))}\n{line}\n")

    with pytest.raises(ValueError, match=message):
        SampleFile(path)


@contextmanager
def disk_of(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_what_was_written(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = samples(10, "x" * 1000)
    with disk_of(4096), pytest.raises(OSError, match="too large"):
        fill(path, rows)

    assert path.stat().st_size == 4096  # the fourth line is there in part
    assert read(path) == rows[:3]
    fill(path, rows[3:])
    assert read(path) == rows


def test_a_file_is_replaced_in_one_piece(tmp_path):
    write_json(tmp_path / "run.json", {"a": SAMPLE})
    with pytest.raises(TypeError):
        write_json(tmp_path / "run.json", {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_json(tmp_path / "run.json", {"a": "\ud800"})

    assert json.loads((tmp_path / "run.json").read_text())["a"]["problem_id"] == "p"
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_the_same_settings_go_on(tmp_path):
    open_run(tmp_path, {"temperature": 1.0, "kwargs": {"a": (1, 2)}}, {"versions": {"torch": "1"}})
    open_run(tmp_path, {"temperature": 1.0, "kwargs": {"a": (1, 2)}}, {"versions": {"torch": "2"}})

    assert json.loads((tmp_path / "run.json").read_text())["versions"] == {"torch": "2"}


def test_other_settings_are_named(tmp_path):
    open_run(tmp_path, {"temperature": 1.0, "top_p": 1.0, "seed": 0}, {})
    fill(tmp_path / "mine" / "samples.jsonl", samples(1))

    with pytest.raises(
        ValueError, match=r"temperature was 1.0 and is 0.6; seed was 0 and is None.*`overwrite`"
    ) as error:
        open_run(tmp_path, {"temperature": 0.6, "top_p": 1.0}, {})
    assert "top_p" not in str(error.value)


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path):
    open_run(tmp_path, {"seed": 0}, {})
    fill(tmp_path / "mine" / "samples.jsonl", samples(2))
    for name in ("mine/notes.txt", "notes/metrics.json", "other/problems.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    open_run(tmp_path, {"seed": 1}, {}, overwrite=True)

    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {"run.json", "mine/notes.txt", "notes/metrics.json"}  # the problems were the run's
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == {"seed": 1}


def test_a_run_without_samples_binds_nobody(tmp_path):
    open_run(tmp_path, {"max_new_tokens": 9}, {})
    keep_problems(tmp_path / "mine" / "problems.jsonl", [{"problem_id": "p", "prompt": "old"}])
    (tmp_path / "mine" / "samples.jsonl").touch()

    open_run(tmp_path, {"max_new_tokens": 8}, {})

    keep_problems(tmp_path / "mine" / "problems.jsonl", [{"problem_id": "p", "prompt": "new"}])


def test_samples_of_unknown_settings_are_refused(tmp_path):
    fill(tmp_path / "mine" / "samples.jsonl", samples(2))

    with pytest.raises(ValueError, match=r"has samples, but no run\.json"):
        open_run(tmp_path, {"seed": 0}, {})
    for record in ("", "[]", "{}", '{"settings": 5}'):
        (tmp_path / "run.json").write_text(record)
        with pytest.raises(ValueError, match=r"run\.json does not say how the samples beside it were made"):
            open_run(tmp_path, {"seed": 0}, {})
    open_run(tmp_path, {"seed": 0}, {}, overwrite=True)
    assert not list((tmp_path / "mine").iterdir())


def test_problems_may_be_added_but_not_change(tmp_path):
    file = tmp_path / "problems.jsonl"
    rows = [{"problem_id": str(n), "prompt": f"line\u2028{n}", "reference": "1"} for n in range(3)]
    keep_problems(file, rows[:2])
    keep_problems(file, rows)
    keep_problems(file, rows[:1])

    assert [json.loads(line) for line in file.read_bytes().splitlines()] == rows
    with pytest.raises(ValueError, match=r"Problem 1 is not what it was .*`reference` was '1' and is '2'"):
        keep_problems(file, [{**rows[1], "reference": "2"}])
    with pytest.raises(ValueError, match=r"written for other problems, such as 0"):
        keep_problems(file, [rows[1], {**rows[0], "problem_id": "another"}])


def test_read(tmp_path):
    samples = [make_sample("a", completion="one\u2028two\nthree"), make_sample("b", correct=None)]
    lines = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    (tmp_path / "samples.jsonl").write_text(lines, encoding="utf-8")
    assert read_samples(tmp_path / "samples.jsonl") == samples


def test_torn_last_line(tmp_path, caplog):
    line = json.dumps(asdict(make_sample()))
    (tmp_path / "samples.jsonl").write_text(f"{line}\n{line[:30]}")
    assert read_samples(tmp_path / "samples.jsonl") == [make_sample()]
    assert "1 line, the last, was cut off" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: missing or unknown fields answer"),
        (json.dumps({**asdict(make_sample()), "score": 1}), "line 2: missing or unknown fields score"),
    ],
)
def test_bad_line(tmp_path, line, message):
    good = json.dumps(asdict(make_sample()))
    (tmp_path / "samples.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=message):
        read_samples(tmp_path / "samples.jsonl")
