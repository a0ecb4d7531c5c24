"""The report of training runs: what its tables hold and its curves draw."""

import math
import re
from html import unescape
from pathlib import Path
from statistics import stdev

import pyarrow
import pyarrow.parquet
import pytest
from report.made import entry, logged, make_evaluation, make_run, session, steps

from trl_opsd.report import curves
from trl_opsd.report.run_report import report_page, step_seconds
from trl_opsd.report.runs import read_runs


pytestmark = pytest.mark.needs("matplotlib")

DOCS = Path(__file__).parents[2] / "docs"


def report(*folders, target="report.html", **kwargs):
    return report_page(read_runs(folders), Path(folders[0]).parent / target, **kwargs)


def tables(page):
    """Rows of cells, of each table."""
    found = []
    for body in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
        found.append([[text(cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)] for row in rows])
    return found


def text(html):
    return unescape(re.sub(r"<[^>]+>", "", html))


def row(page, name):
    [found] = [one for rows in tables(page) for one in rows if one[0] == name]
    return found


def lines(panel, runs):
    [axes] = curves.draw(panel, runs).axes
    return {line.get_label(): [list(values) for values in line.get_data()] for line in axes.lines}


def panel(title, runs):
    [found] = [one for one in curves.main_panels(runs) if one.title == title]
    return found


@pytest.fixture
def folder(tmp_path):
    values = {"rewards/right/mean": 0.5, "reward": 0.5, "away/gate": 1.0, "sampling/step_time": 0.5}
    return make_run(
        tmp_path / "run",
        steps(1.0, 0.5, 0.25, **values),
        sessions=[session(defaults={"learning_rate": 5e-6})],
    )


# What it was


def test_method_and_settings(folder):
    page = report(folder)
    assert "<title>OPSD: run</title>" in page
    assert 'OPSD, <cite>A title</cite>, <a href="https://huggingface.co/papers/2601.18734">2601.18734</a>' in page
    assert "<pre>@misc{opsd}</pre>" in page
    assert row(page, "student") == ["student", "tiny"]
    differing, every = (its for its in tables(page) if its[0][0] == "setting")
    assert differing == [["setting", "value", "default of OPSDConfig"], ["learning_rate", "1e-05", "5e-06"]]
    assert ["teacher", "initial"] in every
    assert row(page, "trl") == ["trl", "1.16.0"]
    assert row(page, "vllm") == ["vllm", "not installed"]
    assert page.index("default of OPSDConfig") < page.index("<summary>All settings")


def test_a_resumed_run_says_so(tmp_path):
    sessions = [session(), session(step=2, learning_rate=0.5, resume_from_checkpoint="auto")]
    page = report(make_run(tmp_path / "run", steps(1.0, 1.0, 1.0), sessions=sessions))
    assert "3 of 3 steps, resumed at step 2." in page
    assert "Changed when it was resumed at step 2: learning_rate from 1e-05 to 0.5." in page


def test_a_run_in_progress(tmp_path):
    page = report(make_run(tmp_path / "run", steps(1.0), max_steps=8))
    assert re.search(r"1 of 8 steps: not finished, last heard of at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.", page)
    assert "The settings of run are not known" in page


def test_a_run_that_has_logged_nothing(tmp_path):
    page = report(make_run(tmp_path / "run", [], max_steps=8, sessions=[session()]))
    assert "nothing has been logged yet" in page
    assert "<h2>Settings" in page
    assert "<svg" not in page
    assert "What it cost" not in page


def test_a_log_of_another_trainer(tmp_path):
    page = report(make_run(tmp_path / "run", [entry(1, loss=1.0), entry(2, loss=0.5)]))
    assert "run: not in the log: distillation_loss, entropy, completions/mean_length." in page
    assert "<figcaption>Loss</figcaption>" in page
    assert "Entropy" not in page
    one_of_ours = make_run(tmp_path / "ours", [entry(1, loss=1.0)], sessions=[session()])
    assert "not in the log" not in report(one_of_ours)  # a method may have no divergence


# How it went


def test_curves_of_one_run(folder):
    runs = read_runs([folder])
    assert lines(panel("Loss", runs), runs) == {"optimized": [[1, 2, 3], [1.0, 0.5, 0.25]]}
    both = lines(panel("Entropy", runs), runs)
    assert both == {"student": [[1, 2, 3], [0.5] * 3], "teacher": [[1, 2, 3], [0.25] * 3]}
    shares = lines(panel("Rollouts that went wrong", runs), runs)
    assert shares == {"truncated": [[1, 2, 3], [12.5] * 3]}  # in percent, and no loops were logged
    assert lines(panel("Reward", runs), runs) == {"right": [[1, 2, 3], [0.5] * 3]}
    assert [one.title for one in curves.other_panels(runs)] == ["away/gate"]


def test_where_curves_begin_and_end(tmp_path):
    losses = [1.0] * 10 + [0.5] * 17 + [0.1, 0.2, 0.6]
    folder = make_run(tmp_path / "run", steps(*losses))
    half = 4.3027 * stdev([0.1, 0.2, 0.6]) / math.sqrt(3)
    shown = f"1 [1, 1] → 0.3 [{0.3 - half:.3g}, {0.3 + half:.3g}]"
    page = report(folder)
    assert row(page, "Loss, optimized (nats)") == ["Loss, optimized (nats)", shown]
    other = make_run(tmp_path / "other", [entry(1, loss=3.0)])
    assert row(report(folder, other), "Loss, optimized (nats)") == ["Loss, optimized (nats)", shown, "3 → 3"]
    assert row(report(folder, other), "Entropy, student (nats)")[2] == "–"
    assert row(page, "Rollouts that went wrong, truncated (%)")[1] == "12.5 [12.5, 12.5] → 12.5 [12.5, 12.5]"


def test_every_metric_is_on_the_page_once(folder):
    page = report(folder)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert captions == [
        "Loss",
        "Divergence from the teacher: distillation_loss, over scored tokens",
        "Entropy: entropy, teacher_entropy, over scored tokens",
        "Entropy gap: entropy_gap, over scored tokens",
        "Length of rollouts: completions/mean_length, over samples",
        "Rollouts that went wrong: rollouts/truncated_rate, over the student&#39;s own rollouts with a token",
        "Reward: rewards/right/mean, over samples",
        "away/gate",
    ]
    assert page.index("Everything else that was logged (1)") < page.index("<figcaption>away/gate")


def test_denominators_are_those_of_the_documentation():
    rows = re.findall(r"^\| (`.*?) \|.*\|(.*?)\|$", (DOCS / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE)
    over, above = {}, ""
    for names, its in rows:
        above = above if its.strip() == "the same" else its.strip()
        over |= dict.fromkeys(re.findall(r"`(.*?)`", names), above)
    for one in curves.PANELS:
        for name in one.curves:
            if not name.startswith("completions/"):  # TRL's
                assert over[name] == one.over, name


def test_runs_lie_over_each_other(tmp_path):
    a, b = (make_run(tmp_path / name, steps(*losses)) for name, losses in (("a", [1.0, 2.0]), ("$b$", [3.0])))
    runs = read_runs([a, b])
    [axes] = curves.draw(panel("Entropy", runs), runs).axes
    drawn = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in axes.lines}
    assert set(drawn) == {"a, student", "a, teacher", "$b$, student", "$b$, teacher"}
    assert drawn["a, student"][0] == drawn["a, teacher"][0] != drawn["$b$, student"][0]
    assert drawn["a, student"][1] == drawn["$b$, student"][1] != drawn["a, teacher"][1]
    assert [one.get_text() for one in axes.get_legend().get_texts()] == ["student", "teacher"]
    page = report(a, b)
    for name, color in (("a", drawn["a, student"][0]), ("$b$", drawn["$b$, student"][0])):
        assert f'<span style="color: {color}">━━</span> {name}' in page
    assert page.count("<cite>") == 0


def test_a_method_is_cited_once(tmp_path):
    a, b = (make_run(tmp_path / name, steps(1.0), sessions=[session()]) for name in "ab")
    page = report(a, b)
    assert "<p>a, b: OPSD, <cite>A title</cite>" in page
    assert page.count("<pre>@misc{opsd}</pre>") == 1


def test_names_are_no_mathematics(tmp_path):
    log = steps(1.0, 0.5, **{"rewards/$a$/mean": 1.0, "rewards/$b$/mean": 0.5})
    assert "$a$</text>" in report(make_run(tmp_path / "run", log))


def test_evaluations_of_the_loss_are_points(tmp_path):
    log = [*steps(1.0, 0.5), entry(2, eval_loss=0.75)]
    runs = read_runs([make_run(tmp_path / "run", log)])
    [axes] = curves.draw(panel("Loss", runs), runs).axes
    held_out = axes.lines[1]
    assert (held_out.get_label(), held_out.get_marker(), held_out.get_linestyle()) == (
        "optimized, evaluation",
        "o",
        "None",
    )
    assert [list(values) for values in held_out.get_data()] == [[2], [0.75]]


def test_what_guards_saw_is_drawn(tmp_path):
    log = [*steps(1.0, 0.5), entry(3, loss=1.0, **{"guards/entropy": 2})]
    sessions = [session(guards=["Guard `entropy` at step 3: it falls."])]
    runs = read_runs([make_run(tmp_path / "run", log, sessions=sessions)])
    assert "<p>run: Guard `entropy` at step 3: it falls.</p>" in report(runs[0].folder)
    assert lines(panel("What guards saw", runs), runs) == {"entropy": [[3], [2]]}


def test_divergences_from_several_teachers_share_a_panel(tmp_path):
    values = {f"teachers/{name}/distillation_loss": loss for name, loss in {"maths": 0.5, "code": 0.25}.items()}
    runs = read_runs([make_run(tmp_path / "run", steps(1.0, 0.5, **values))])
    found = lines(panel("Divergence from each teacher", runs), runs)
    assert {name: line[1] for name, line in found.items()} == {"maths": [0.5, 0.5], "code": [0.25, 0.25]}


def test_long_curves_are_thinned():
    steps, values = curves.thinned(range(1, 1001), [float(step) for step in range(1, 1001)])
    assert len(steps) == 334
    assert steps[:2] == values[:2] == [2, 5]  # means of three
    assert steps[-1] == 1000
    assert curves.thinned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])


# What came of it


@pytest.fixture
def evaluated(tmp_path):
    def make(name, *verdicts, completion="So it is {}."):
        folder = tmp_path / name
        before = make_evaluation(folder / "eval" / "step-0", *[False] * 6, True, True, completion="Hm, {}.")
        after = make_evaluation(folder / "eval" / "step-3", *verdicts, completion=completion)
        log = [logged(0, before), *steps(1.0, 0.5, 0.25), logged(3, after)]
        part = make_run(tmp_path / "parts" / name, log, sessions=[session()])
        for file in part.iterdir():
            file.rename(folder / file.name)
        return folder

    return make


def test_accuracy_while_training(evaluated):
    folder = evaluated("run", *[True] * 6, False, True)
    runs = read_runs([folder])
    [accuracy, length, cut] = curves.benchmark_panels(runs)
    assert lines(accuracy, runs) == {"avg@1": [[0, 3], [25.0, 87.5]]}
    [axes] = curves.draw(accuracy, runs).axes
    band = axes.collections[0].get_paths()[0].get_extents()
    low, high = 100 * runs[0].log[0]["eval_sums/avg@1_low"], 100 * runs[0].log[-1]["eval_sums/avg@1_high"]
    assert (band.y0, band.y1) == pytest.approx((low, high))
    assert (length.title, cut.title) == ("Length on sums", "Truncated on sums")

    page = report(folder)
    assert row(page, "step 0")[1].startswith("25.0 % [")
    assert row(page, "step 0")[4] == ""
    last = row(page, "step 3")
    assert last[1].startswith("87.5 % [")
    assert last[1].endswith("] (avg@1)")
    assert re.fullmatch(r"\+62\.5 points \[.*\]", last[4])
    assert "sums: the first problems of each kind (6 improved, 1 worse, 1 same)" in page


def test_answers_before_and_after(evaluated):
    page = report(evaluated("run", *[True] * 6, False, True, completion="<b>{}</b>" + "x" * 4000))
    shown = re.findall(r"<h3>Problem (p\d\d) <small>right: (\d)</small></h3>", page)
    assert shown == [("p00", "0"), ("p01", "1"), ("p06", "6"), ("p07", "7")]
    assert "<pre>How much is p06?</pre>" in page
    assert "step 0 <small>right, 16 tokens</small><pre>Hm, 6.</pre>" in page
    assert "step 3 <small>wrong, 16 tokens</small><pre>&lt;b&gt;6&lt;/b&gt;xxx" in page
    assert "[… 1,008 characters …]" in page


def test_two_runs_beside_one_another(evaluated):
    a, b = evaluated("a", *[True] * 6, False, True), evaluated("b", *[True] * 8)
    page = report(a, b)
    assert "<title>a, b</title>" in page
    assert row(page, "a, step 3")[1].startswith("87.5 %")
    assert row(page, "b, step 3")[1].startswith("100.0 %")
    [between] = [its for its in tables(page) if its[0][1] == "difference of what is right"]
    assert between[1][0] == "b"
    assert between[1][1].startswith("+12.5 points [")
    assert "against a</caption>" in page
    columns = re.findall(r"<div>(\S.*?) <small>", page)[:3]
    assert columns == ["a, step 0", "a, step 3", "b, step 3"]
    assert row(page, "generated tokens") == ["generated tokens", "120", "120"]


def test_settings_of_two_runs_that_differ(tmp_path):
    a = make_run(tmp_path / "a", steps(1.0), sessions=[session(output_dir="a")])
    b = make_run(tmp_path / "b", steps(1.0), sessions=[session(learning_rate=0.5, output_dir="b")])
    page = report(a, b)
    [settings] = [its for its in tables(page) if its[1][0] == "learning_rate"]
    assert settings == [["", "a", "b"], ["learning_rate", "1e-05", "0.5"]]
    assert "Versions and devices: no difference." in page


def test_evaluations_afterwards(tmp_path, folder):
    make_evaluation(folder / "eval" / "later", True, True, False, True)
    make_evaluation(tmp_path / "base", False, False, False, True)
    page = report(folder, evaluations=[tmp_path / "base"])
    assert row(page, "run, later")[1].startswith("75.0 % [")
    assert row(page, "base")[1].startswith("25.0 % [")
    with pytest.raises(ValueError, match=r"run has no run\.json: name the folder of a run of `trl-opsd eval`"):
        report(folder, evaluations=[folder])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda after: (after / "sums" / "samples.jsonl").unlink(), "the samples of one are not there"),
        (lambda after: (after / "run.json").write_text("{}"), "graded by different versions of the scorer"),
    ],
)
def test_what_cannot_be_paired_is_said(evaluated, change, reason):
    folder = evaluated("run", *[True] * 8)
    change(folder / "eval" / "step-3")
    page = report(folder)
    assert row(page, "step 3")[4] == reason
    assert "Rollouts before and after" not in page


def test_metrics_of_another_version(folder):
    make_evaluation(folder / "eval" / "later", True)
    (folder / "eval" / "later" / "sums" / "metrics.json").write_text('{"summary": {}}')
    with pytest.raises(ValueError, match=r"metrics\.json was written by another version of this library"):
        report(folder)


def test_logged_completions_are_shown_where_there_are_no_evaluations(folder):
    (folder / "completions").mkdir()
    for step in (1, 2, 3):
        rows = [
            {
                "step": step,
                "prompt": [{"role": "user", "content": f"<i>{index}"}],
                "completion": f"{step} <b>",
                "right": 0.5,
                "advantage": 0.25,
            }
            for index in range(5)
        ]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / "completions" / f"completions_{step:05d}.parquet")
    page = report(folder)
    assert page.count("step 1 <small>right 0.5, advantage +0.25</small><pre>1 &lt;b&gt;</pre>") == 3
    assert page.count("step 3 <small>") == 3
    assert "step 2 <small>" not in page
    assert "<h3>run, rollout 1</h3>\n<pre>user: &lt;i&gt;0</pre>" in page


def test_inspected_rollouts_are_linked(tmp_path, folder):
    (folder / "inspect").mkdir()
    (folder / "inspect" / "step-50.html").touch()
    assert '<a href="run/inspect/step-50.html">run, step-50</a>' in report(folder)
    assert '<a href="../run/inspect/step-50.html">run, step-50</a>' in report(folder, target="pages/report.html")


def test_hostile_text_is_text(tmp_path):
    bad = "<script>alert('x')</script>\ud83d"
    folder = make_run(
        tmp_path / "<script>",
        steps(1.0, 1.0, **{f"rewards/{bad}/mean": 1.0, bad: 1.0}),
        sessions=[session(defaults={"teacher": bad}, teacher=bad)],
        method={"name": bad, "paper": bad, "title": bad, "citation": bad},
    )
    page = report(folder)
    page.encode()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(" in page


# What it cost


def test_cost(folder):
    page = report(folder)
    assert row(page, "steps") == ["steps", "3"]
    assert row(page, "generated tokens") == ["generated tokens", "120"]
    assert row(page, "tokens read and generated") == ["tokens read and generated", "300"]
    assert row(page, "time in optimizer steps, rollouts included")[1] == "6.0 s"
    assert row(page, "of which rollouts were sampled")[1] == "25%"
    assert row(page, "peak memory of a process")[1] == "1.50 GiB"
    assert "time of the last session" not in page  # it has no end


def test_time_of_steps_that_are_logged_together(tmp_path):
    log = [entry(step, loss=1.0, step_time=seconds) for step, seconds in ((10, 2.0), (20, 3.0))]
    [run] = read_runs([make_run(tmp_path / "run", [*log, entry(20, train_runtime=7200.0)])])
    assert step_seconds(run) == 50.0
    assert row(report(run.folder), "time of the last session, evaluations included")[1] == "2.0 h"


def test_a_report_in_a_browser(browser, evaluated):
    bad = "<img src=x onerror=\"document.title='taken'\">"
    folder = evaluated("run", *[True] * 8, completion=bad + "</pre><script>document.title = 'taken'</script>{}")
    file = folder / "report.html"
    file.write_text(report(folder))
    for scheme in ("light", "dark"):
        browser.open(file, scheme)
        assert browser.run("return document.title") == "OPSD: run"
        assert browser.run("return document.querySelectorAll('main svg').length") == 9
        shown = browser.run("return [...document.querySelectorAll('.columns pre')].map(e => e.textContent)")
        assert bad + "</pre><script>document.title = 'taken'</script>0" in shown
        # Nothing is wider than the page
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert not browser.errors()
