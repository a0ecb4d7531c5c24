import re
from dataclasses import replace

import pytest
from study.made import result

from trl_opsd.comparison.__main__ import COMMAND
from trl_opsd.comparison.arms import ARMS, FULL, QUICK, family_of
from trl_opsd.comparison.report import write_report
from trl_opsd.comparison.tables import COLUMNS
from trl_opsd.experiment.arms import BASES
from trl_opsd.experiment.runner import Results
from trl_opsd.experiment.train import Run, write_result
from trl_opsd.methods import METHODS


pytestmark = pytest.mark.needs("matplotlib")

PLAN = replace(FULL, seeds=(1, 2, 3))
_CURVE = (0.5, 0.7, 0.9)
# What differs from an arm that gets from 50 to 90 %
VALUES = {
    "base": {"accuracy": 0.5, "ood": 0.4, "curve": ()},
    "opsd_none": {"accuracy": 0.5, "curve": (0.5, 0.5, 0.5)},
    "opsd_other_solution": {"accuracy": 0.1, "curve": (0.5, 0.3, 0.1)},
    "grpo": {"accuracy": 0.7, "curve": (0.5, 0.6, 0.7)},
    "dasd": {"accuracy": 0.0, "curve": (0.5, 0.0, 0.0), "tokens": 72.0},
    "opsdc": {"accuracy": 0.5, "curve": (0.5, 0.5, 0.5), "tokens": 20.0},
}


def made(arm, base, seed):
    values = {"accuracy": 0.9, "curve": _CURVE, **VALUES.get(arm, {})}
    if arm == "told":
        values["curve"] = ()
    left = result(**values)
    if base == "verbose":
        left["final"] = {name: left["final"][name] for name in ("test", "tune")}
    if arm == "sft":
        left["generated_tokens"] = 0
        left["curve"] = [{**point, "generated_tokens": 0} for point in left["curve"]]
    return left


def fill(folder, plan=PLAN, arms=None):
    """Leaves the results of a comparison."""
    results = Results(folder)
    runs = plan.base_runs()
    for arm, base in plan.pairs():
        if arms is None or arm in arms:
            rate = plan.learning_rates[0] if plan.is_trained(arm) else None
            runs += [*plan.tuning_runs(arm, base), *plan.reported_runs(arm, base, rate)]
    for run in runs:
        arm = "base" if run.arm is None else run.arm.name
        write_result(results.path(run), {**made(arm, run.base.name, run.seed), "settings": run.settings()})
    return results


def report(folder, plan=PLAN, **kwargs):
    page = folder / "methods_compared.md"
    write_report(fill(folder, plan, **kwargs), plan, page)
    return page.read_text()


def cells(text, arm, base="middling"):
    [line] = [line for line in text.splitlines() if line.startswith(f"| {base} | {arm} |")]
    return dict(zip(COLUMNS, line.strip("| ").split(" | "), strict=True))


def test_the_table_has_intervals_budgets_and_the_goal(tmp_path):
    text = report(tmp_path)
    assert "Not complete" not in text
    assert "Runs that failed" not in text
    opsd = cells(text, "opsd")
    # The seeds agree, and 90 % of 300 problems are known to 3.4 points
    assert opsd["held out, %"] == "90.0 ± 3.4"
    assert opsd["longer, %"] == "50.0 ± 6.9"
    assert opsd["learns by; its teacher reads"] == "divergence; the reference"
    assert (opsd["seeds"], opsd["rate"]) == ("3 of 3", "3e-05*")
    assert (opsd["tokens per answer"], opsd["markers per 1k"]) == ("40.0 ± 0.0", "20.0 ± 0.0")
    assert (opsd["steps"], opsd["generated tokens"]) == ("20 ± 0", "2,000 ± 0")
    assert (opsd["tokens to the goal"], opsd["seconds to it"]) == ("2,000 ± 0", "20 ± 0")
    assert (opsd["lost since its best, points"], opsd["collapsed"]) == ("0.0 ± 0.0", "0 of 3")
    assert cells(text, "GRPO (TRL)")["tokens to the goal"] == "never"
    assert cells(text, "SFT (TRL)")["generated tokens"] == "0 ± 0"
    base = cells(text, "the base itself")
    assert (base["held out, %"], base["longer, %"], base["steps"]) == ("50.0", "40.0", "–")


def test_shortening_has_a_goal_of_its_own(tmp_path):
    text = report(tmp_path)
    opsdc = cells(text, "opsdc", "verbose")
    assert opsdc["longer, %"] == "–"
    assert opsdc["tokens to the goal"] == "never"  # as long as it was: the curve's lengths are all alike
    assert cells(text, "no training, told to be brief", "verbose")["steps"] == "–"
    assert cells(text, "the base itself", "verbose")["tokens per answer"] == "40.0"


@pytest.mark.parametrize("lengths", [(40.0, 30.0, 20.0), (40.0, 20.0, 10.0)])
def test_the_goal_is_short_and_still_right(tmp_path, lengths):
    results = fill(tmp_path)
    for run in PLAN.reported_runs("opsdc", "verbose", 3e-5):
        left = result(**VALUES["opsdc"])
        for point, length in zip(left["curve"], lengths, strict=True):
            point["mean_tokens"] = length
        left["curve"][1]["accuracy"] = 0.45
        left["curve"][2]["accuracy"] = 0.3
        left["final"] = {"test": left["final"]["test"]}
        write_result(results.path(run), {**left, "settings": run.settings()})
    write_report(results, PLAN, tmp_path / "page.md")
    expected = "never" if lengths[1] == 30.0 else "1,000 ± 0"
    assert cells((tmp_path / "page.md").read_text(), "opsdc", "verbose")["tokens to the goal"] == expected


def test_a_method_that_collapses_is_said_to(tmp_path):
    text = report(tmp_path)
    dasd = cells(text, "dasd")
    assert (dasd["held out, %"], dasd["collapsed"], dasd["tokens per answer"]) == ("0.0 ± 0.0", "3 of 3", "72.0 ± 0.0")
    [sentence] = re.findall(r"^- Collapsed: (.*)\.$", text, re.MULTILINE)
    assert "dasd (3 of 3)" in sentence
    assert "opsd, its teacher reads another problem's solution (3 of 3)" in sentence
    assert "opsd (" not in sentence
    assert "No run that is there collapsed." in text  # from the verbose base


def test_sentences_are_what_the_figures_support(tmp_path):
    text = report(tmp_path)
    assert "opsd − opsd, its teacher reads what the student reads: +40.0 ± 6.6 points (above)" in text
    assert "another problem's solution: +80.0 ± 4.8 points (above)" in text
    assert "the solution in another order: +0.0 ± 4.8 points (not told apart)" in text
    [middling, verbose] = re.findall(
        r"^- Against GRPO with as many tokens: above: ([\w, ]+); below: (.*)\.$", text, re.MULTILINE
    )
    assert "opsd" in middling[0].split(", ")
    assert middling[1] == "dasd"
    assert verbose[1] == "opsdc"
    # DASD is one of the policy gradients that read the reference
    assert re.search(r"divergence; the reference \(\d methods\) − policy gradient; the reference \(\d+\): \+", text)
    assert re.search(r"policy gradient; the reference \d+\.\d % \([\w, ]*dasd", text)


def test_no_sentence_without_seeds_to_support_it(tmp_path):
    text = report(tmp_path, replace(PLAN, seeds=(1,)))
    assert "opsd − opsd" not in text
    assert "Against GRPO" not in text
    assert cells(text, "opsd")["held out, %"] == "90.0"


def test_an_arm_that_failed_stays_in_the_table(tmp_path):
    results = fill(tmp_path)
    failed = [Run(BASES["middling"], seed, ARMS["sdpo"], 3e-5) for seed in PLAN.seeds]
    failed.append(Run(BASES["middling"], 0, ARMS["sdpo"], 3e-4))
    for run in failed:
        write_result(results.path(run), {"settings": run.settings(), "error": "RuntimeError: out of luck"})
    write_report(results, PLAN, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    sdpo = cells(text, "sdpo")
    assert (sdpo["seeds"], sdpo["rate"], sdpo["held out, %"], sdpo["collapsed"]) == ("0 of 3", "3e-05*†", "–", "–")
    for run in failed:
        assert f"- `{run.name}`: RuntimeError: out of luck" in text
    total = sum(len(PLAN.reported_runs(arm, base, None)) for arm, base in PLAN.pairs())
    assert f"Not complete: {total - 3} of the {total} reported runs are there." in text


def test_every_arm_has_a_row_before_anything_was_run(tmp_path):
    write_report(Results(tmp_path), FULL, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "Not complete: 0 of the" in text
    for arm, base in FULL.pairs():
        assert cells(text, ARMS[arm].title, base)["held out, %"] == "–"
    assert "![" not in text
    assert not re.findall(r"\d ± \d", text)


def test_tables_are_whole(tmp_path):
    [table] = re.findall(r"(?:^\|.*\|$\n)+", report(tmp_path), re.MULTILINE)
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert len(table.splitlines()) == 2 + len(PLAN.pairs()) + len(PLAN.bases)


def test_a_quick_comparison_says_so(tmp_path):
    text = report(tmp_path, QUICK)
    assert "quick comparison: 2 seeds" in text
    assert "ranks nothing" in text
    assert "is tuned over" not in text


# Plots


def test_curves_are_drawn_by_family_beside_grpo(tmp_path, drawn):
    report(tmp_path)
    figure = drawn[tmp_path / "methods_compared" / "tokens.png"]
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    for arm, base in PLAN.pairs():
        if arm in ("grpo", "sft", "told"):
            continue
        showing = [
            title
            for title, axes in panels.items()
            if title.startswith(base) and ARMS[arm].title in [line.get_label() for line in axes.lines]
        ]
        assert len(showing) == 1
    axes = panels["middling base: divergence; the reference"]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["opsd"].get_xdata()) == [0, 1000, 2000]
    assert list(lines["opsd"].get_ydata()) == pytest.approx(_CURVE)
    assert list(lines["GRPO (TRL)"].get_ydata()) == pytest.approx([0.5, 0.6, 0.7])
    assert set(lines["SFT (TRL), at its end"].get_ydata()) == {0.9}
    assert axes.get_xlabel() == "generated tokens"
    assert "opsd, its teacher reads what the student reads" in [
        line.get_label() for line in panels["middling base: controls"].lines
    ]
    for axes in panels.values():
        assert {"GRPO (TRL)", "SFT (TRL), at its end"} <= {line.get_label() for line in axes.lines}


def test_accuracy_over_length_has_a_point_for_every_arm(tmp_path, drawn):
    results = fill(tmp_path)
    for seed, tokens in ((1, 30.0), (2, 40.0), (3, 56.0)):
        run = Run(BASES["middling"], seed, ARMS["opsd"], 3e-5)
        left = {**result(accuracy=0.9, tokens=tokens, curve=_CURVE), "settings": run.settings()}
        write_result(results.path(run), left)
    write_report(results, PLAN, tmp_path / "page.md")
    figure = drawn[tmp_path / "page" / "length.png"]
    points = {}
    for axes in figure.axes:
        for container in axes.containers:
            (point, _, (across, _)) = container
            [[ends]] = [across.get_segments()]
            points[axes.get_title(), container.get_label()] = (point.get_xydata()[0].tolist(), ends[:, 0].tolist())
    expected = {(BASES[base].title, label(arm)) for arm, base in PLAN.pairs()}
    assert set(points) == expected
    assert points["middling base", label("opsd")] == (pytest.approx([42.0, 0.9]), pytest.approx([30.0, 56.0]))
    assert points["middling base", label("dasd")][0] == [72.0, 0.0]
    assert [axes.get_xlabel() for axes in figure.axes] == ["tokens per answer"] * 2
    [itself] = [line for line in figure.axes[0].lines if line.get_label() == "the base itself"]
    assert itself.get_xydata().tolist() == [[40.0, 0.5]]


def label(arm):
    return f"{arm} ({family_of(ARMS[arm])})" if arm in METHODS else ARMS[arm].title


# The command


@pytest.mark.parametrize("flags", [["--plan"], ["--plan", "--quick"], ["--plan", "--only", "opsd"]])
def test_the_plan_runs_nothing(tmp_path, capsys, flags):
    assert COMMAND.main([*flags, "--output_dir", str(tmp_path), "--page", str(tmp_path / "page.md")]) == 0
    assert "core-hours" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_command_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    ran = []

    def execute(run, path):
        ran.append(run)
        if run.arm is None:
            (path.parents[1] / "bases" / run.base.name).mkdir(parents=True, exist_ok=True)
        arm = "base" if run.arm is None else run.arm.name
        write_result(path, {**made(arm, run.base.name, run.seed), "settings": run.settings()})

    monkeypatch.setattr("trl_opsd.experiment.runner.execute_in_process", execute)
    page = tmp_path / "docs" / "page.md"
    flags = ["--quick", "--output_dir", str(tmp_path), "--page", str(page)]
    COMMAND.main([*flags, "--only", "opsd", "--processes", "1"])
    assert [run.name for run in ran] == ["middling", *(f"opsd-middling-lr0.0001-seed{seed}-x0.3" for seed in (1, 2))]
    assert cells(page.read_text(), "GRPO (TRL)")["seeds"] == "0 of 2"

    COMMAND.main(flags)
    names = [run.name for run in ran]
    assert (
        len(names)
        == len(set(names))
        == len(QUICK.base_runs()) + sum(len(QUICK.reported_runs(*pair, None)) for pair in QUICK.pairs())
    )
    assert "Not complete" not in page.read_text()
    COMMAND.main(flags)
    assert len(ran) == len(names)


def test_a_number_of_processes_that_makes_no_sense_is_refused(tmp_path, capsys):
    assert COMMAND.main(["--processes", "0", "--output_dir", str(tmp_path)]) == 2
    assert "`--processes` must be at least 1, got 0." in capsys.readouterr().err
