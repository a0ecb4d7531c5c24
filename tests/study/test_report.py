import re
from dataclasses import replace
from pathlib import Path

import pytest
from study.made import FALSE, TRUE, result, run_of

from trl_opsd.experiment.runner import Results
from trl_opsd.experiment.train import write_result
from trl_opsd.study.__main__ import COMMAND
from trl_opsd.study.arms import ARMS, FULL, QUICK
from trl_opsd.study.report import write_report


pytestmark = pytest.mark.needs("matplotlib")

PLAN = replace(FULL, seeds=(1, 2))


def fill(folder, plan, arms=None, values=TRUE):
    """Leaves the results of a study, with the bases' own."""
    results = Results(folder)
    runs = plan.base_runs()
    for arm, base in plan.pairs():
        if arms is None or arm in arms:
            rate = None if ARMS[arm].trainer == "none" else plan.learning_rates[0]
            runs += [*plan.tuning_runs(arm, base), *plan.reported_runs(arm, base, rate)]
    for run in runs:
        made = result(**values.get(run.arm.name if run.arm else "base", {}))
        write_result(results.path(run), {**made, "settings": run.settings()})
    return results


def report(folder, plan, **kwargs):
    page = folder / "study.md"
    judged = write_report(fill(folder, plan, **kwargs), plan, page)
    return page.read_text(), {(verdict.claim, verdict.base): verdict.outcome for verdict in judged}


def test_a_complete_study_says_what_the_numbers_say(tmp_path):
    text, judged = report(tmp_path, PLAN)
    # All rates are equal, so that the lowest is taken, and a better one may lie below
    doubtful = {claim for claim in judged if "each at its best" in claim[0]}
    assert judged == {claim: "cannot be seen here" if claim in doubtful else "holds here" for claim in judged}
    assert len(doubtful) == 2
    assert text.count("**holds here**") == 2 * (len(judged) - 2)  # in the table and in its sentence
    assert "Not complete" not in text
    assert "Runs that failed" not in text
    row = next(line for line in text.splitlines() if line.startswith("| OPSD | 2 of 2"))
    assert "| 3e-05* | 80.0 ± 0.0 | 60.0 ± 0.0 | 60.0 ± 0.0 | 5.0 ± 0.0 |" in row
    assert "| 1,000 ± 0 |" in row  # to reach GRPO's best
    assert "| the weak base itself | – | – | 90.0 | 70.0 | 70.0 | 30.0 | 80.0 | 0 | 0 | – | – | – | – | – |" in text
    for image in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (tmp_path / image).read_bytes().startswith(b"\x89PNG")
    assert "| weak | groups without spread, % | 80 ± 0 | 80 ± 0 | 90 ± 0 | 100 ± 0 | 100 ± 0 |" in text
    assert "| weak | mean reward, % | 10 ± 0 | 10 ± 0 | 10 ± 0 | 10 ± 0 | 10 ± 0 |" in text
    # OPSD against GRPO
    assert "| weak | 50 % | 25.0 ± 0.0 | 5,000 ± 0 | 1,000 ± 0 | 5.0 ± 0.0 | 1,000 ± 0 | 5.0 ± 0.0 |" in text
    assert "| weak | OPSD | 2,000 ± 0 | 10.0 ± 0.0 | 50.0 ± 0.0 | +26.7 ± 0.0 | +10.0 ± 0.0 |" in text
    assert "the best point of GRPO is 10.0 ± 0.0 % (weak base) and 10.0 ± 0.0 % (middling base)" in text
    assert "](https://huggingface.co/papers/2603.05433) | verbose |" in text
    assert "on worked solutions, in words | ours | weak |" in text
    assert "times fewer tokens to GRPO's best accuracy, 4 being asked for: 5.0 [5.0, 5.0] over 2 seeds (met)" in text
    assert "| no training, told to be brief | 1 of 1 | – |" in text
    assert "| OPSDC, frozen teacher | 2.5 | 2.5 | 2.5 | 2.5 |" in text  # 90 %, less 70 of 80 tokens
    assert "accuracy-weak.png" in text
    assert "long-middling.png" in text
    assert "tokens-verbose.png" in text


def test_plots_show_the_arms_of_their_base(tmp_path, drawn):
    report(tmp_path, PLAN)
    figures = {path.name: figure for path, figure in drawn.items()}
    assert set(figures) == {
        f"{name}-{base}.png"
        for name, base in [
            *(("accuracy", base) for base in PLAN.bases),
            ("long", "middling"),
            ("tokens", "verbose"),
        ]
    }
    shown = {name: {line.get_label() for line in figure.axes[0].lines} for name, figure in figures.items()}
    pairs = {base: {arm for arm, its in PLAN.pairs() if its == base} for base in PLAN.bases}
    for base in ("weak", "middling"):
        assert shown[f"accuracy-{base}.png"] == {ARMS[arm].title for arm in pairs[base] if not arm.endswith("_long")}
        assert figures[f"accuracy-{base}.png"].axes[0].get_title() == f"Accuracy against generated tokens, {base} base"
    assert shown["long-middling.png"] == {ARMS[arm].title for arm in pairs["middling"] if arm.endswith("_long")}
    assert shown["tokens-verbose.png"] == shown["accuracy-verbose.png"]
    assert ARMS["opsdc_50"].title in shown["tokens-verbose.png"]


def test_an_arm_whose_runs_are_those_of_another_is_drawn_once(tmp_path, drawn):
    report(tmp_path, PLAN)  # at one rate, opsdc_1_same is opsdc_1
    labels = [line.get_label() for line in drawn[tmp_path / "study" / "tokens-verbose.png"].axes[0].lines]
    its = [arm for arm, base in PLAN.pairs() if base == "verbose"]
    assert sorted(labels) == sorted(ARMS[arm].title for arm in its if ARMS[arm].trained_as is None)
    assert len(labels) < len(its)


def test_tables_are_whole(tmp_path):
    text, _ = report(tmp_path, PLAN)
    tables = re.findall(r"(?:^\|.*\|$\n)+", text, re.MULTILINE)
    assert len(tables) == 6 + len(PLAN.bases)
    for table in tables:
        lines = table.splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert len(lines) > 2


def test_contrary_results_give_the_contrary(tmp_path):
    text, judged = report(tmp_path, PLAN, values=FALSE)
    assert set(judged.values()) == {"does not hold here"}
    assert "| weak | 75 % | 32.5 ± 0.0 | 1,000 ± 0 | never | never | never | never |" in text
    assert "| weak | 50 % | 25.0 ± 0.0 | 1,000 ± 0 | 2,000 ± 0 | 0.5 ± 0.0 | 1,000 ± 0 | 1.0 ± 0.0 |" in text


def test_a_partial_study_says_what_is_missing(tmp_path):
    text, judged = report(tmp_path, PLAN, arms=("opsd", "sft", "opsd_reverse_kl", "opsd_jsd"))
    assert "Not complete: 12 of the" in text
    assert judged["Forward KL is best for OPSD", "middling"] == "holds here"
    assert judged["A fixed teacher is more stable than a live one", "middling"] == "not run"
    assert "| GRPO, 8 rollouts, 4 times the tokens | 0 of 2 | – | – |" in text


def test_nothing_at_all_still_gives_a_page(tmp_path):
    write_report(Results(tmp_path), FULL, tmp_path / "study.md")
    text = (tmp_path / "study.md").read_text()
    assert "Not complete: 0 of the" in text
    assert "**holds here**" not in text


def test_failures_are_listed(tmp_path):
    results = fill(tmp_path, PLAN)
    for run in (run_of("weak", 0, "grpo", 1e-3), run_of("weak", 2, "grpo", 3e-5)):
        write_result(results.path(run), {"settings": run.settings(), "error": "RuntimeError: out of luck"})
    stale = run_of("weak", 1, "sft", 3e-5)
    write_result(results.path(stale), {"settings": {}, "error": "RuntimeError: of another study"})
    write_report(results, PLAN, tmp_path / "study.md")
    text = (tmp_path / "study.md").read_text()
    assert f"`{run.name}`: RuntimeError: out of luck" in text
    assert "| GRPO, 8 rollouts, 4 times the tokens | 1 of 2 | 3e-05*† |" in text
    assert "of another study" not in text


def test_a_quick_study_says_so(tmp_path):
    text, _ = report(tmp_path, QUICK)
    assert "quick study" in text
    assert "nothing was tuned" in text
    assert "Every arm was tuned" not in text


@pytest.mark.parametrize("flags", [["--plan"], ["--plan", "--quick"], ["--plan", "--only", "opsd"]])
def test_the_plan_runs_nothing(tmp_path, capsys, flags):
    COMMAND.main([*flags, "--output_dir", str(tmp_path), "--page", str(tmp_path / "page.md")])
    assert "core-hours" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_command_runs_what_it_is_told_and_reports_all(tmp_path, monkeypatch, capsys):
    ran = []

    def execute(run, path):
        ran.append(run)
        write_result(path, {**result(), "settings": run.settings()})

    monkeypatch.setattr("trl_opsd.experiment.runner.execute_in_process", execute)
    page = tmp_path / "docs" / "page.md"
    COMMAND.main(["--quick", "--only", "opsd", "--output_dir", str(tmp_path), "--page", str(page)])
    assert {run.arm and run.arm.name for run in ran} == {None, "opsd"}
    assert "| SFT on the solutions | 0 of 2 |" in page.read_text()
    assert "not run" in capsys.readouterr().out

    ran.clear()
    COMMAND.main(["--quick", "--report", "--output_dir", str(tmp_path), "--page", str(page)])
    assert ran == []


def test_the_readmes_figures_are_those_of_the_study():
    root = Path(__file__).parents[2]
    section = re.search(r"## What the study says\n(.*?)\n## ", (root / "README.md").read_text(), re.DOTALL)
    figures = set(re.findall(r"\d+\.\d+", section[1]))
    assert len(figures) > 10
    assert figures <= set(re.findall(r"\d+\.\d+", (root / "docs/study.md").read_text()))
