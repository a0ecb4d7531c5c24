import json

import pytest
from rich.console import Console

from trl_opsd.bench.arguments import LossArguments, StepArguments
from trl_opsd.bench.report import REPORTS, CaseResult, write_json
from trl_opsd.bench.runner import Row


def loss_result(case, scale=1.0):
    rows = [
        Row("ours-eager", [{"seconds": s * scale} for s in (1.0, 3.0, 2.0)], {"peak_extra_bytes": 3 * 2**20}),
        Row("dense", [{"seconds": s * scale} for s in (4.0, 4.0, 5.0)], {"peak_extra_bytes": 900 * 2**20}),
        Row("liger", error="does not run here: it cannot clip"),
        Row("floor", [{"seconds": s * scale} for s in (1.0, 1.0, 1.0)]),
    ]
    return CaseResult({**case, "device": "cpu"}, rows, ["ours-eager", "dense", "floor"] * 3)


def step_result():
    sample = {"seconds": 3.0, "generation_seconds": 1.0, "learning_seconds": 2.0}
    facts = {"model_bytes": 2**28, "loading_bytes": 2**29, "peak_learning_bytes": 2**30}
    rows = [Row("self-distillation", [sample], facts), Row("sdft", error="does not run here: ImportError: no")]
    return CaseResult({**StepArguments(model="org/model").cases()[0], "device": "cpu"}, rows, ["self-distillation"])


def shown(name, result):
    console = Console(width=200, record=True, force_terminal=False)
    console.print(REPORTS[name].table(result))
    return console.export_text()


def cells(text, contender):
    [line] = [line for line in text.splitlines() if line.startswith(f"│ {contender} ")]
    return [cell.strip() for cell in line.split("│")[1:-1]]


def test_loss_table():
    [case] = LossArguments().cases()
    text = shown("loss", loss_result(case))
    assert cells(text, "dense") == ["dense", "4.000", "4.000 … 5.000", "4.00×", "2.00×", "900", ""]
    assert cells(text, "floor") == ["floor", "1.000", "1.000 … 1.000", "1.00×", "0.50×", "–", ""]
    assert "does not run here: it cannot clip" in cells(text, "liger")
    assert "V = 151,936" in text


def test_step_table():
    text = shown("step", step_result())
    assert cells(text, "self-distillation")[:9] == [
        "self-distillation",
        "3.000",
        "1.000",
        "2.000",
        "2.000 … 2.000",
        "1.00×",
        "256",
        "512",
        "1,024",
    ]
    assert "does not run here: ImportError: no" in cells(text, "sdft")


@pytest.mark.parametrize(
    "sizes",
    [{}, {"num_tokens": [256, 1024, 4096]}, {"num_tokens": [256, 1024], "vocab_size": [32000, 64000, 128000]}],
)
def test_loss_plot(sizes, tmp_path):
    cases = LossArguments(**sizes).cases()
    results = [loss_result(case, scale=case["num_tokens"] * case["vocab_size"] / 1e8) for case in cases]
    REPORTS["loss"].plot(results).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_longest_sweep_is_the_axis():
    cases = LossArguments(num_tokens=[256, 1024], vocab_size=[32000, 64000, 128000]).cases()
    axes = REPORTS["loss"].plot([loss_result(case) for case in cases]).axes
    assert len(axes) == 4
    for panel in axes:
        assert panel.get_xlabel() == "vocabulary V"
        assert panel.get_xscale() == panel.get_yscale() == "log"
    assert [line.get_label() for line in axes[0].lines] == ["ours-eager", "dense", "floor"]


def test_step_plot(tmp_path):
    REPORTS["step"].plot([step_result()]).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_json(tmp_path):
    [case] = LossArguments().cases()
    write_json(tmp_path / "results.json", {"benchmark": "loss"}, [loss_result(case)])

    content = json.loads((tmp_path / "results.json").read_text())
    assert content["benchmark"] == "loss"
    [written] = content["cases"]
    assert written["case"]["vocab_size"] == 151936
    assert written["order"] == ["ours-eager", "dense", "floor"] * 3
    ours, _, failed, _ = written["contenders"]
    assert ours == {
        "contender": "ours-eager",
        "samples": [{"seconds": 1.0}, {"seconds": 3.0}, {"seconds": 2.0}],
        "facts": {"peak_extra_bytes": 3 * 2**20},
        "error": None,
        "median": {"seconds": 2.0},
    }
    assert failed["error"] == "does not run here: it cannot clip"
    assert failed["median"] is None
