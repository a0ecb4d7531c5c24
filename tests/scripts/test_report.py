import re

import pytest
from report.made import make_evaluation, make_run, session, steps

from trl_opsd.cli import main


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path / "run", steps(1.0, 0.5), sessions=[session()])


@pytest.mark.needs("matplotlib")
def test_a_run_is_reported_on_in_its_folder(folder, capsys):
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"Written to {folder / 'report.html'}.\n"
    assert "<title>OPSD: run</title>" in (folder / "report.html").read_text()


@pytest.mark.needs("matplotlib")
def test_several_runs_are_compared_where_one_is(folder, tmp_path, monkeypatch, capsys):
    other = make_run(tmp_path / "other", steps(1.0))
    make_evaluation(tmp_path / "base", True)
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(folder), str(other), "--eval", "base"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<title>run, other</title>" in page
    assert '<th scope="row">base</th>' in page
    assert main(["report", str(folder), "--output", "pages/run.html"]) == 0
    assert (tmp_path / "pages" / "run.html").is_file()


def test_folders_that_are_no_runs_are_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert re.match(r"trl-opsd report: error: .* is no training run", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_plots_need_matplotlib(folder, monkeypatch, capsys):
    monkeypatch.setattr("trl_opsd.report.plots.find_spec", lambda name: None)
    assert main(["report", str(folder)]) == 2
    assert "pip install 'trl-opsd[eval]'" in capsys.readouterr().err
    assert not (folder / "report.html").exists()


@pytest.mark.needs("matplotlib")
def test_interrupted_it_leaves_no_page(folder, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_opsd.report.run_report.report_page", interrupt)
    assert main(["report", str(folder)]) == 130
    assert "interrupted. No page was written." in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as done:
        main(["report", "--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    for flag in ("RUN", "--eval", "--output", "docs/reports.md"):
        assert flag in out
