import re
from dataclasses import replace
from pathlib import Path

import pytest

from trl_opsd.experiment.runner import Results
from trl_opsd.experiment.train import write_result
from trl_opsd.real_model.arms import ARMS, FULL, PARTS, QUICK
from trl_opsd.real_model.report import write_report
from trl_opsd.real_model.tables import AGAINST, columns


ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.needs("matplotlib")

VALUES = {"floor": 0.0, "told": 0.9, "sft": 0.8, "sdft": 0.5, "skill_floor": 0.5, "skill_opsd": 0.8, "skill_told": 1.0}
LENGTHS = {"brevity_floor": 40.0, "brevity_told": 10.0, "opsdc_frozen": 16.0}
DIVERGENCES = {"floor": 0.0, "told": 0.0, "sft": 0.5}
ONCE = {
    "facts": {},
    "brevity": {
        "mean_tokens": 40.0,
        "wordings": [
            {"wording": wording, "right": [True] * 8, "lengths": [length, length + 2] * 4, "said": "It is | so"}
            for wording, length in ((None, 39), ("{prompt}\n\nBe brief.", 9))
        ],
    },
    "skill": {
        "families": {
            "chain_sum": {"model": [True, False] * 8, "told": [True] * 16, "question": "1 + 1 ="},
            "gcd": {"model": [False] * 16, "told": [False] * 16, "question": "Of 2 and 4?"},
        }
    },
}


def result(arm, seed=1):
    value, trained = VALUES.get(arm, 0.7), ARMS[arm].trainer != "none"
    tests = {name: 0.1 if name == "two" else value for name in PARTS[ARMS[arm].bases[0]].tests}
    final = {**tests, "unrelated": 0.5, "solved": 0.25, "mean_tokens": LENGTHS.get(arm, 12.0)}
    answer = {"question": "Where?", "answer": "there", "said": f"It is | {arm} <b>", "right": True, "cut": True}
    watched = PARTS[ARMS[arm].bases[0]].watched
    points = [{"step": step, "mean_tokens": 9.0} | dict.fromkeys(watched, step / 20) for step in (0, 10)]
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
    for run in plan.base_runs():
        once = {"final": {"unrelated": 0.5}, "cpu_seconds": 9.0, "peak_memory_gb": 1.0, **ONCE[run.base.name]}
        write_result(results.path(run), {**once, "settings": run.settings()})
    for arm in arms:
        [base] = ARMS[arm].bases
        rate = plan.rates(base)[0] if plan.is_trained(arm) else None
        for run in [*plan.tuning_runs(arm, base), *plan.reported_runs(arm, base, rate)]:
            write_result(results.path(run), {**result(arm, run.seed), "settings": run.settings()})
    return results


def report(folder, plan=FULL, **kwargs):
    page = folder / "real_model.md"
    write_report(fill(folder, plan, **kwargs), plan, page)
    return page.read_text()


def section(text, title):
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


SECTIONS = {"facts": "Facts it does not know", "brevity": "Brevity", "skill": "A skill"}


def of(base):
    return [arm for arm in ARMS.values() if arm.bases == (base,)]


def cells(text, arm):
    [base] = ARMS[arm].bases
    lines = section(text, SECTIONS[base]).splitlines()
    line = next(line for line in lines if line.startswith(f"| {ARMS[arm].title} |"))
    return dict(zip(columns(base), line.strip("| ").split(" | "), strict=True))


def test_the_table_has_every_arm_with_its_interval(tmp_path):
    text = report(tmp_path)
    assert "Not complete" not in text
    assert "Runs that failed" not in text
    sdft = cells(text, "sdft")
    assert (sdft["seeds"], sdft["rate"], sdft["new wordings, %"]) == ("3 of 3", "0.001*", "50.0 ± 0.0")
    assert sdft["divergence from the base"] == "0.102 ± 0.002"  # 2.48 standard errors of 0.101, 0.102, 0.103
    assert sdft["sums and products, %"] == "25.0 ± 0.0"
    assert (sdft["generated tokens"], sdft["seconds"], sdft["GB at most"]) == ("1,000 ± 0", "60 ± 0", "2.5 ± 0.0")
    assert cells(text, "told")["rate"] == "–"
    assert cells(text, "told")["new wordings, %"] == "90.0 ± 0.0"
    assert cells(text, "opsdc_frozen")["tokens per answer"] == "16.0 ± 0.0"
    assert "sums and products, %" not in cells(text, "skill_opsd")  # the skill is sums
    for arm in ARMS:
        assert len(cells(text, arm)) == len(columns(ARMS[arm].bases[0]))


def test_arms_are_held_against_the_ceiling_and_sft(tmp_path):
    text = report(tmp_path)
    assert "The model itself answers 0.0 % of the questions in new wordings, and 90.0 % while it reads" in text
    rows = against(text, "facts")
    assert rows["SFT on the answers"] == ["89 %", "3 of 3", "–", "–", "–", "–"]
    different = ["-30.0 ± 0.0, below", "+0.0 ± 0.0", "-0.400 ± 0.000, below", "+0.0 ± 0.0"]
    assert rows["SDFT"] == ["56 %", "0 of 3", *different]
    assert set(rows) == {arm.title for arm in ARMS.values() if arm.trainer != "none" and arm.bases == ("facts",)}


def test_brevity_is_of_the_way_to_what_the_prompt_does(tmp_path):
    text = report(tmp_path)
    assert "The model itself takes 40.0 tokens for an answer, and 10.0 told to be brief." in text
    assert against(text, "brevity")["OPSDC, teacher frozen"][:4] == [
        "80 %",
        "3 of 3",
        "+0.0 ± 0.0",
        "+4.0 ± 0.0, above",
    ]


def test_every_wording_and_every_family_that_was_tried_is_there(tmp_path):
    text = report(tmp_path)
    assert r"| `{prompt} Be brief.` | 100 [68, 100] | 10.0 ± 0.9 | It is \| so |" in text
    assert "| the question alone | 100 [68, 100] | 40.0 ± 0.9 |" in text
    skill = section(text, "A skill")
    assert "| `chain_sum` | 50 [28, 72] | 100 [81, 100] | +50 [" in skill
    assert "| `gcd` | 0 [0, 19] | 0 [0, 19] | +0 [" in skill
    assert against(text, "skill")["OPSD, forward KL"][0] == "60 %"


def test_it_says_whose_rate_is_whose(tmp_path):
    text = report(tmp_path)
    assert "take one over: “STaR” that of “SFT on the answers”, “OPSD, its teacher" in section(text, "A skill")
    assert "take one over" not in section(text, "Brevity")
    assert "“SFT on the teacher's samples” that of “SFT on the answers”, “SFT on MixSD's data” that" in text
    assert "take one over" not in report(tmp_path, replace(FULL, arms=("floor", "sft")))


def test_one_seed_is_no_difference(tmp_path):
    text = report(tmp_path, replace(FULL, seeds=(1,)))
    assert {tuple(row[2:]) for row in against(text, "facts").values()} == {("–", "–", "–", "–")}


def test_the_token_page_is_linked_if_it_is_there(tmp_path):
    assert "tokens.html" not in report(tmp_path)
    (tmp_path / "tokens.html").write_text("")
    assert "](tokens.html)" in report(tmp_path)


def against(text, base):
    part = section(text, SECTIONS[base]).partition(f"| {' | '.join(AGAINST)} |")[2]
    rows = [line.strip("| ").split(" | ") for line in part.partition("\n\n")[0].splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_what_is_missing_is_said(tmp_path):
    text = report(tmp_path, arms=("floor", "sft"))
    assert f"Not complete: 6 of the {3 * len(ARMS)} reported runs are there." in text
    assert cells(text, "sdft")["new wordings, %"] == "–"
    assert against(text, "facts") == {}  # without a ceiling


def test_a_page_without_results_claims_nothing(tmp_path):
    write_report(Results(tmp_path), FULL, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "Not complete: 0 of the" in text
    assert text.count("Nothing yet.") == 5
    assert "![" not in text
    assert not re.findall(r"\d ± \d", text)


def test_a_run_that_failed_is_named(tmp_path):
    results = fill(tmp_path)
    failed = FULL.reported_runs("sdft", "facts", PARTS["facts"].learning_rates[0])[0]
    write_result(results.path(failed), {"settings": failed.settings(), "error": "RuntimeError: out of luck"})
    write_report(results, FULL, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert f"- `{failed.name}`: RuntimeError: out of luck" in text
    assert cells(text, "sdft")["seeds"] == "2 of 3"


def test_what_was_said_is_shown_as_text(tmp_path):
    text = report(tmp_path)
    [row] = [line for line in section(text, SECTIONS["facts"]).splitlines() if line.startswith("| Where? |")]
    assert r"✓ It is \| floor \<b\> …" in row


def test_every_run_is_listed_with_the_command(tmp_path):
    text = report(tmp_path)
    for run in FULL.reported_runs("sft", "facts", FULL.rates("facts")[0]):
        assert f"- `{run.name}`: trained 80 %, new 80 %" in text
    assert "by `make real`" in text
    quick = tmp_path / "quick"
    quick.mkdir()
    text = report(quick, replace(QUICK, model="Qwen/Qwen3-0.6B", device="cuda"), arms=QUICK.arms)
    assert 'make real ARGS="--model Qwen/Qwen3-0.6B --quick --device cuda"' in text
    assert "These are the quick runs: one seed" in text
    assert "The rate, 0.001, was not tuned." in text


def test_curves_are_drawn_of_what_was_trained(tmp_path, drawn):
    report(tmp_path)
    for base, tops in (("facts", (0.5, 0.5)), ("brevity", (0.5, 9.0)), ("skill", (0.5,))):
        figure = drawn[tmp_path / "real_model" / f"{base}.png"]
        its = {arm.title for arm in ARMS.values() if arm.trainer != "none" and arm.bases == (base,)}
        for axes, top in zip(figure.axes, tops, strict=True):
            lines = {line.get_label(): line for line in axes.lines}
            assert set(lines) == its
            line = next(iter(lines.values()))
            assert list(line.get_xdata()) == [0, 10]
            assert line.get_ydata()[-1] == top


def test_the_page_says_what_the_runs_of_the_repository_gave(tmp_path, monkeypatch, drawn):
    monkeypatch.chdir(ROOT)
    write_report(Results(Path("docs/real_model")), FULL, tmp_path / "real_model.md")

    def figures(page):
        return [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith(("| ", "- `", "> "))]

    assert figures(ROOT / "docs/real_model.md") == figures(tmp_path / "real_model.md")


def test_the_readmes_tables_are_the_pages():
    page = (ROOT / "docs/real_model.md").read_text(encoding="utf-8")
    shown = section((ROOT / "README.md").read_text(encoding="utf-8"), "On a pretrained model")
    tables = re.findall(r"(?:^\|.*\n)+", shown, flags=re.MULTILINE)
    for table in tables:
        head, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
        assert len(rows) >= 3
        titles = {title for title, *_ in rows}
        [arms] = [its for base in PARTS if titles <= (its := {arm.title: arm.name for arm in of(base)}).keys()]
        for title, *values in rows:
            its = cells(page, arms[title])
            assert its["seeds"] == "3 of 3"
            assert values == [its[column] for column in head[1:]]
    assert tables
