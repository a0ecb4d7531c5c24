import dataclasses
import json
import subprocess
import sys

import pytest
from eval.made import make_run, make_sample
from rich.console import Console

from trl_opsd.eval.compare import compare
from trl_opsd.eval.metrics import summarize
from trl_opsd.eval.run_folder import write_json
from trl_opsd.report.evaluation import (
    Rows,
    budget_plot,
    change_plot,
    comparison_rows,
    length_plot,
    show,
    summary_rows,
    to_markdown,
)


BASE = make_run([True, True, False, False], [False] * 4, [True] * 4, num_tokens=1000)
NEW = make_run([True] * 4, [False] * 4, [True, True, True, False], num_tokens=750)


def row(rows, name):
    [cells] = [cells for cells in rows.rows if cells[0] == name]
    return cells[1:]


def test_summary():
    other = [dataclasses.replace(sample, benchmark="other") for sample in make_run(*[[True]] * 7, *[[False]] * 3)]
    rows = summary_rows("my run", [summarize(BASE), summarize(other)])
    assert rows.title == "my run"
    assert rows.header == ["", "made-up", "other"]
    assert row(rows, "problems") == ["3", "10"]
    assert row(rows, "completions per problem") == ["4", "1"]
    assert row(rows, "avg@k")[1] == "70.0 % [39.7, 89.2]"
    assert row(rows, "pass@4")[1] == "–"
    assert row(rows, "pass@2")[0].startswith("61.1 % [")
    assert row(rows, "mean tokens") == ["1,000", "10.0"]
    assert row(rows, "accuracy within 512 tokens") == ["0.0 % [0.0, 56.1]", "–"]
    assert row(rows, "accuracy within 8 tokens")[1].startswith("0.0 %")
    assert row(rows, "answer formats") == ["boxed 100.0 %", "boxed 100.0 %"]
    assert len(rows.notes) == 1


def test_metrics_are_in_order():
    names = [cells[0] for cells in summary_rows("run", [summarize(make_run([True] * 16))]).rows]
    assert names[2:9] == ["avg@k", "pass@2", "pass@4", "pass@8", "pass@16", "majority@k", "accuracy among terminated"]


def test_no_more_than_three_budgets():
    samples = [make_sample(sample_index=index, num_tokens=tokens) for index, tokens in enumerate((10, 5000))]
    names = [cells[0] for cells in summary_rows("run", [summarize(samples)]).rows]
    assert [name for name in names if "within" in name] == [
        f"accuracy within {n} tokens" for n in ("1,024", "2,048", "4,096")
    ]


def test_what_is_missing_is_said():
    samples = [*make_run([True] * 3, [True]), make_sample("q", correct=None)]
    notes = summary_rows("run", [summarize(samples)]).notes
    assert "made-up is unfinished: 1 to 3 completions per problem" in notes[1]
    assert "the shortest completions finish first" in notes[1]
    assert "1 of 5 completions have no verdict" in notes[2]
    rows = comparison_rows("a", "b", compare(samples, samples))
    assert [note[:18] for note in rows.notes[3:]] == [
        "a: made-up is unfi",
        "a: made-up: 1 of 5",
        "b: made-up is unfi",
        "b: made-up: 1 of 5",
    ]
    assert row(rows, "completions per problem")[0] == "1 to 3"


def test_comparison():
    comparison = compare([*BASE, make_sample("only here")], NEW, common_only=True)
    rows = comparison_rows("before", "after", comparison)
    assert rows.title == "made-up, 3 problems"
    assert rows.header == ["", "before", "after", "difference"]
    base, new, difference = row(rows, "avg@k")
    assert base.startswith("50.0 % [")
    assert new.startswith("58.3 % [")
    assert difference.startswith("+8.3 points [-")
    assert difference.endswith("], p = 1")
    assert row(rows, "mean tokens") == ["1,000", "750", "reduction 25.0 %"]
    assert row(rows, "truncated")[2].startswith("+0.0 points [-")
    assert row(rows, "pass@2")[2] == ""
    assert rows.notes == [
        comparison.accuracy_verdict,
        comparison.length_verdict,
        "Problems: 1 improved, 1 worse, 1 same.",
        "Left out because only one run has them: 1 problems.",
    ]


def test_markers_have_signs():
    base = [make_sample(name, completion="wait " * (index + 1)) for index, name in enumerate("abc")]
    new = [make_sample(name, completion="wait " * 3 * (index + 1)) for index, name in enumerate("abc")]
    rows = comparison_rows("a", "b", compare(base, new))
    assert row(rows, "markers, also inside words")[2].startswith("+4.00 [+")
    assert row(rows, "marker words per 1k tokens")[2].startswith("+400 [+")


def test_nothing_graded():
    rows = comparison_rows("a", "b", compare(make_run([None]), make_run([None])))
    assert row(rows, "avg@k") == ["–", "–", "–"]


def test_console():
    rows = Rows("[red]title", ["", "a[b]"], [["x[x]", "1 [2, 3]"]], ["note [bold] " + 100 * "n"])
    console = Console(width=150, record=True, force_terminal=False)
    show(rows, console)
    text = console.export_text()
    for part in ("[red]title", "a[b]", "x[x]", "1 [2, 3]", "note [bold]"):
        assert part in text


def test_markdown():
    rows = Rows("title", ["", "a|b"], [["x", "1"], ["y", "2"]], ["one", "two"])
    assert to_markdown(rows) == "### title\n\n|  | a\\|b |\n|---|---:|\n| x | 1 |\n| y | 2 |\n\n- one\n- two\n"


def test_json(tmp_path):
    comparison = compare(BASE, NEW)
    write_json(tmp_path / "comparison.json", {"comparison": comparison, "summary": summarize(BASE)})
    content = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert content["comparison"]["accuracy_difference"] == dataclasses.asdict(comparison.accuracy_difference)
    assert content["comparison"]["changes"][0] == {"problem_id": "p000", "base": 0.5, "new": 1.0, "change": "improved"}
    assert content["summary"]["pass_at_k"]["4"]["value"] == pytest.approx(2 / 3)
    assert content["summary"]["mean_tokens"] == {"value": 1000, "low": None, "high": None}


# Plots


@pytest.mark.needs("matplotlib")
def test_budget_plot():
    samples = [
        make_sample(f"p{problem}", index, problem > 0, num_tokens=30 * 4**index)
        for problem in range(4)
        for index in range(3)
    ]
    axes = budget_plot({"base": summarize(samples), "wrong": summarize(make_run([False], num_tokens=100))}).axes[0]
    right, wrong = axes.lines
    assert right.get_label() == "base"
    assert right.get_xdata().tolist() == [32, 64, 128, 256, 480]
    assert right.get_ydata() == pytest.approx([25, 25, 50, 50, 75])
    # Without a right answer there is still a curve.
    assert wrong.get_ydata().tolist() == [0, 0]
    assert len(axes.collections) == 2
    low, high = axes.collections[0].get_paths()[0].get_extents().intervaly
    assert low < 25
    assert high > 75
    assert axes.get_xlabel() == "token budget"
    assert axes.get_xscale() == "log"


@pytest.mark.needs("matplotlib")
@pytest.mark.parametrize("lengths", [[7], [1, 1, 2], [10, 12, 13, 40] * 10, [100, 38912]])
def test_length_plot(lengths):
    axes = length_plot({"base": lengths, "new": [2 * length for length in lengths]}).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        f"base, mean {sum(lengths) / len(lengths):,.0f}",
        f"new, mean {2 * sum(lengths) / len(lengths):,.0f}",
    ]
    outlines = [patch.get_xy() for patch in axes.patches]
    assert len(outlines) == 4
    # No completion falls outside of the bins: each outline goes up to shares that add up to 100 %.
    for filled in outlines[::2]:
        heights = filled[1 : (len(filled) + 1) // 2 : 2, 1]
        assert heights.sum() == pytest.approx(100)
    assert [line.get_xdata()[0] for line in axes.lines] == [
        sum(lengths) / len(lengths),
        2 * sum(lengths) / len(lengths),
    ]


@pytest.mark.needs("matplotlib")
def test_length_plot_of_equal_lengths():
    axes = length_plot({"base": [7, 7]}).axes[0]
    assert axes.patches[0].get_xy()[:, 0].tolist() == [7, 7, 8, 8, 7]


@pytest.mark.needs("matplotlib")
@pytest.mark.parametrize("num_problems", [10, 50])
def test_change_plot(num_problems):
    base = make_run(*[[True, False]] * num_problems)
    new = make_run(*[[False, False]] * 3, *[[True, True]] * 2, *[[True, False]] * (num_problems - 5))
    axes = change_plot(compare(base, new)).axes[0]
    heights = [bar.get_height() for bar in sorted(axes.patches, key=lambda bar: bar.get_x())]
    assert heights == [-50] * 3 + [0] * (num_problems - 5) + [50] * 2
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["3 worse", f"{num_problems - 5} same", "2 improved"]
    assert len(axes.get_xticks()) == (num_problems if num_problems <= 40 else 0)


def test_tables_load_without_transformers():
    code = (
        "import sys, trl_opsd.report.evaluation; assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
