import re
from dataclasses import replace

import pytest

from trl_opsd.experiment.runner import Results
from trl_opsd.experiment.train import write_result
from trl_opsd.real_model.arms import ARMS, FULL, QUICK
from trl_opsd.real_model.report import COLUMNS, write_report


pytestmark = pytest.mark.needs("matplotlib")

VALUES = {"floor": 0.0, "told": 0.9, "sft": 0.8, "sdft": 0.5}
DIVERGENCES = {"floor": 0.0, "told": 0.0, "sft": 0.5}


def result(arm, seed=1):
    new, trained = VALUES.get(arm, 0.7), arm not in ("floor", "told")
    final = {"trained": 1.0, "new": new, "two": 0.1, "unrelated": 0.5, "mean_tokens": 12.0}
    answer = {"question": "Where?", "answer": "there", "said": f"It is | {arm} <b>", "right": True, "cut": True}
    points = [{"step": step, "trained": step / 10, "new": step / 20, "two": 0.0} for step in (0, 10)]
    return {
        "steps": 10 * trained,
        "generated_tokens": 1000 * trained,
        "seconds": 60.0 * trained,
        "curve": points if trained else [],
        "final": final | {"divergence": DIVERGENCES.get(arm, 0.1) + 0.001 * seed * trained},
        "answers": [answer],
        "peak_memory_gb": 2.5,
        "cpu_seconds": 90.0,
    }


def fill(folder, plan=FULL, arms=tuple(ARMS)):
    results = Results(folder)
    runs = plan.base_runs()
    for arm in arms:
        rate = plan.learning_rates[0] if plan.is_trained(arm) else None
        runs += [*plan.tuning_runs(arm, "facts"), *plan.reported_runs(arm, "facts", rate)]
    for run in runs:
        arm = run.arm.name if run.arm else "floor"
        write_result(results.path(run), {**result(arm, run.seed or 0), "settings": run.settings()})
    return results


def report(folder, plan=FULL, **kwargs):
    page = folder / "real_model.md"
    write_report(fill(folder, plan, **kwargs), plan, page)
    return page.read_text()


def cells(text, arm):
    line = next(line for line in text.splitlines() if line.startswith(f"| {ARMS[arm].title} |"))
    return dict(zip(COLUMNS, line.strip("| ").split(" | "), strict=True))


def test_the_table_has_every_arm_with_its_interval(tmp_path):
    text = report(tmp_path)
    assert "Not complete" not in text
    assert "Runs that failed" not in text
    sdft = cells(text, "sdft")
    assert (sdft["seeds"], sdft["rate"], sdft["new wordings, %"]) == ("3 of 3", "0.0005*", "50.0 ± 0.0")
    assert sdft["divergence from the base"] == "0.102 ± 0.002"  # 2.48 standard errors of 0.101, 0.102, 0.103
    assert (sdft["generated tokens"], sdft["seconds"], sdft["GB at most"]) == ("1,000 ± 0", "60 ± 0", "2.5 ± 0.0")
    assert cells(text, "told")["rate"] == "–"
    assert cells(text, "told")["new wordings, %"] == "90.0 ± 0.0"
    for arm in ARMS:
        assert len(cells(text, arm)) == len(COLUMNS)


def test_arms_are_held_against_the_ceiling_and_sft(tmp_path):
    text = report(tmp_path)
    assert "The model itself answers 0.0 % of the questions in new wordings, and 90.0 % while it reads" in text
    rows = {row[0]: row[1:] for row in against(text)}
    assert rows["SFT on the answers"] == ["89 %", "3 of 3", "–", "–", "–", "–"]
    different = ["-30.0 ± 0.0, below", "+0.0 ± 0.0", "-0.400 ± 0.000, below", "+0.0 ± 0.0"]
    assert rows["SDFT"] == ["56 %", "0 of 3", *different]
    assert set(rows) == {arm.title for arm in ARMS.values() if arm.trainer != "none"}


def test_one_seed_is_no_difference(tmp_path):
    text = report(tmp_path, replace(FULL, seeds=(1,)))
    assert {tuple(row[3:]) for row in against(text)} == {("–", "–", "–", "–")}


def against(text):
    part = text.partition("## What the figures support")[2].partition("## What it says")[0]
    return [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")][1:]


def test_what_is_missing_is_said(tmp_path):
    text = report(tmp_path, arms=("floor", "sft"))
    assert f"Not complete: 6 of the {3 * len(ARMS)} reported runs are there." in text
    assert cells(text, "sdft")["new wordings, %"] == "–"
    assert "SDFT" not in text.partition("## What the figures support")[2]
    assert against(text) == []  # without a ceiling


def test_a_page_without_results_claims_nothing(tmp_path):
    write_report(Results(tmp_path), FULL, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "Not complete: 0 of the" in text
    assert text.count("Nothing yet.") == 2
    assert "![" not in text
    assert not re.findall(r"\d ± \d", text)


def test_a_run_that_failed_is_named(tmp_path):
    results = fill(tmp_path)
    failed = FULL.reported_runs("sdft", "facts", FULL.learning_rates[0])[0]
    write_result(results.path(failed), {"settings": failed.settings(), "error": "RuntimeError: out of luck"})
    write_report(results, FULL, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert f"- `{failed.name}`: RuntimeError: out of luck" in text
    assert cells(text, "sdft")["seeds"] == "2 of 3"


def test_what_was_said_is_shown_as_text(tmp_path):
    text = report(tmp_path)
    [row] = [line for line in text.splitlines() if line.startswith("| Where? |")]
    assert r"✓ It is \| floor \<b\> …" in row


def test_every_run_is_listed_with_the_command(tmp_path):
    text = report(tmp_path)
    for run in FULL.reported_runs("sft", "facts", FULL.learning_rates[0]):
        assert f"- `{run.name}`: trained 100 %, new 80 %" in text
    assert "by `make real`" in text
    quick = tmp_path / "quick"
    quick.mkdir()
    text = report(quick, replace(QUICK, model="Qwen/Qwen3-0.6B", device="cuda"), arms=QUICK.arms)
    assert 'make real ARGS="--model Qwen/Qwen3-0.6B --quick --device cuda"' in text
    assert "These are the quick runs: one seed" in text
    assert "The rate, 0.002, was not tuned." in text


def test_curves_are_drawn_of_what_was_trained(tmp_path, drawn):
    report(tmp_path)
    figure = drawn[tmp_path / "real_model" / "recall.png"]
    for axes, top in zip(figure.axes, (1.0, 0.5), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines) == {arm.title for arm in ARMS.values() if arm.trainer != "none"}
        assert list(lines["SDFT"].get_xdata()) == [0, 10]
        assert list(lines["SDFT"].get_ydata()) == [0.0, top]
