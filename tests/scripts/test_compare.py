import json
from dataclasses import replace

import pytest
from eval.made import make_run, make_sample

from trl_opsd.eval.run_folder import SampleFile, keep_problems, open_run
from trl_opsd.report import evaluation
from trl_opsd.report.evaluation import length_plot
from trl_opsd.scripts.compare import main


def write_run(folder, settings, details=None, prompt="2+2?", **benchmarks):
    open_run(folder, settings, details or {})
    for name, samples in benchmarks.items():
        ids = sorted({sample.problem_id for sample in samples})
        keep_problems(folder / name / "problems.jsonl", [{"problem_id": one, "prompt": prompt} for one in ids])
        file = SampleFile(folder / name / "samples.jsonl")
        for sample in samples:
            file.append(replace(sample, benchmark=name))
        file.close()
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    settings = {"model_name_or_path": "org/a", "temperature": 1.0, "top_p": 0.95, "chat_template_kwargs": {"a": True}}
    details = {"other_fields": {"preset": "opsd", "num_samples": 12}}
    runs = {"aime": make_run([True, False], [False, False]), "amc": make_run([True])}
    base = write_run(tmp_path / "first", settings, details, **runs)
    settings = {**settings, "model_name_or_path": "org/b", "temperature": 0.6, "chat_template_kwargs": {"a": False}}
    details = {"other_fields": {"preset": "opsd", "num_samples": 8}}
    runs["aime"] = make_run([True, True], [False, False])
    return base, write_run(tmp_path / "second", settings, details, **runs)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_console(folders, capsys):
    assert main(folders) == 0
    output = capsys.readouterr().out
    assert "aime, 2 problems" in output
    assert "amc, 1 problems" in output
    assert "Accuracy: no detectable difference, +25.0 points [" in output
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines()]
    assert ["settings.model_name_or_path", "org/a", "org/b"] in lines
    assert ["settings.temperature", "1.0", "0.6"] in lines
    assert ["settings.top_p", "0.95", "0.95"] in lines
    assert ["other_fields.num_samples", "12", "8"] in lines
    assert "preset" not in output
    differing = "settings.temperature, settings.chat_template_kwargs.a"
    assert " ".join(output.split()).count(f"Warning: the runs were sampled differently ({differing}).") == 1
    assert "prompts differ" not in output


def test_no_warning_when_sampled_alike(tmp_path, capsys):
    settings = {"model_name_or_path": "org/a", "temperature": 1.0, "dtype": "auto", "scorer_version": "2"}
    base = write_run(tmp_path / "a" / "run", settings, aime=make_run([True]))
    new = write_run(
        tmp_path / "b" / "run",
        {**settings, "model_name_or_path": "org/b"},
        prompt="Please: 2+2?",
        aime=make_run([True]),
    )
    assert main([base, new]) == 0
    output = capsys.readouterr().out
    assert "Warning" not in output
    assert "dtype" not in output
    assert "The prompts differ" in output
    # Two folders of one name.
    assert "base" in output
    assert "new" in output


def test_other_versions_of_the_scorer(tmp_path, capsys):
    runs = [write_run(tmp_path / one, {"scorer_version": one}, aime=make_run([True])) for one in "12"]
    assert main(runs) == 2
    error = capsys.readouterr().err
    assert "different versions of the scorer (1, 2)" in error
    assert "Run the older one's `trl-opsd eval` again" in error


def test_files(folders, tmp_path, drawn):
    output_dir = tmp_path / "some" / "comparison"
    assert main([*folders, "--output_dir", str(output_dir)]) == 0
    assert "### aime, 2 problems" in (output_dir / "comparison.md").read_text(encoding="utf-8")
    content = json.loads((output_dir / "comparison.json").read_text(encoding="utf-8"))
    assert content["base"]["settings"]["model_name_or_path"] == "org/a"
    assert content["new"]["settings"]["model_name_or_path"] == "org/b"
    assert [comparison["benchmark"] for comparison in content["comparisons"]] == ["aime", "amc"]
    for name in ("accuracy", "lengths", "changes"):
        assert (output_dir / "aime" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    labels = {
        "accuracy": "right within the budget (%)",
        "lengths": "completions (%)",
        "changes": "change of accuracy (points)",
    }
    for benchmark, num_problems in (("aime", 2), ("amc", 1)):
        axes = {name: drawn[output_dir / benchmark / f"{name}.png"].axes[0] for name in labels}
        assert {name: one.get_ylabel() for name, one in axes.items()} == labels
        assert axes["changes"].get_xlabel() == f"{num_problems} problems, sorted"
        assert [line.get_label() for line in axes["accuracy"].lines] == ["first", "second"]


@pytest.mark.needs("matplotlib")
def test_nothing_graded(tmp_path):
    runs = [write_run(tmp_path / name, {}, aime=make_run([None])) for name in "ab"]
    assert main([*runs, "--output_dir", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out" / "aime").iterdir()] == ["lengths.png"]


@pytest.mark.needs("matplotlib")
def test_common_only(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluation, "length_plot", lambda lengths: drawn.append(lengths) or length_plot(lengths))
    samples = make_run([True], [False])
    longer = [*samples, make_sample("q", num_tokens=90_000)]
    base = write_run(tmp_path / "a", {}, aime=samples, amc=samples)
    new = write_run(tmp_path / "b", {}, aime=longer, hmmt=samples)
    assert main([base, new]) == 2
    assert "Only one run has amc, hmmt. Leave it out with --common_only." in capsys.readouterr().err

    assert main([base, new, "--common_only", "--output_dir", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "Left out because only one run has them: amc, hmmt." in output
    assert "Left out because only one run has them: 1 problems." in output
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["left_out"] == ["amc", "hmmt"]
    assert drawn == [{"a": [10, 10], "b": [10, 10]}]


def test_common_only_is_passed_on(tmp_path, capsys):
    base = write_run(tmp_path / "a", {}, aime=make_run([True]))
    new = write_run(tmp_path / "b", {}, aime=make_run([True], [False]))
    assert main([base, new]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "trl-opsd compare: error: aime: The runs differ in their problems: only the new run has p001."
    )
    assert error.count("\n") == 1


@pytest.mark.needs("matplotlib")
def test_bad_folders(folders, tmp_path, capsys):
    def error_of(*args):
        assert main(args) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no run.json" in error_of(folders[0], str(empty))
    (empty / "run.json").write_text("{")
    assert "run.json is not JSON" in error_of(folders[0], str(empty))
    (empty / "run.json").write_text("[]")
    assert "run.json holds no settings" in error_of(folders[0], str(empty))
    (empty / "run.json").write_text("{}")
    assert "have no benchmark in common" in error_of(folders[0], str(empty))
    assert "Not a directory" in error_of(*folders, "--output_dir", str(empty / "run.json" / "out"))


def test_plots_need_matplotlib(folders, monkeypatch, capsys):
    monkeypatch.setattr("trl_opsd.report.plots.find_spec", lambda name: None)
    assert main([*folders, "--output_dir", "never_made"]) == 2
    assert "pip install 'trl-opsd[eval]'" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    assert output.startswith("usage: trl-opsd compare")
    assert "95 % interval" in output
    assert "--common_only" in output
