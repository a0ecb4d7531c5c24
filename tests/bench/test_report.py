import json

import pytest
from rich.console import Console

from trl_opsd.bench.arguments import LossArguments, StepArguments, TeacherArguments
from trl_opsd.bench.report import _COLORS, REPORTS, CaseResult, write_json
from trl_opsd.bench.runner import Row


def loss_result(case, scale=1.0):
    facts = {"peak_extra_bytes": 3 * 2**20, "kernel": "eager"}
    rows = [
        Row("ours-eager", [{"seconds": s * scale} for s in (1.0, 3.0, 2.0)], facts),
        Row("dense", [{"seconds": s * scale} for s in (4.0, 4.0, 5.0)], {"peak_extra_bytes": 900 * 2**20}),
        Row("liger", error="does not run here: it cannot clip"),
        Row("floor", [{"seconds": s * scale} for s in (1.0, 1.0, 1.0)]),
    ]
    return CaseResult({**case, "device": "cpu"}, rows, ["ours-eager", "dense", "floor"] * 3)


pytestmark = pytest.mark.needs("matplotlib")

PARTS = {"preparation": 0.25, "forward": 0.5, "backward": 1.0, "optimizer": 0.25}


def step_result(alone=(), **fields):
    parts = {f"{part}_seconds": seconds for part, seconds in PARTS.items()}
    sample = {"seconds": 3.0, "generation_seconds": 1.0, "learning_seconds": 2.0, **parts}
    facts = {"model_bytes": 2**28, "first_seconds": 9.0, "peak_learning_bytes": 2**30, "peak_bytes": 2**31}
    rows = [
        Row("self-distillation", [sample], facts),
        Row("sdft", error="does not run here: ImportError: no"),
        Row("distillation", [{key: 2 * value for key, value in sample.items()}], facts),
    ]
    for row in rows:
        row.alone = row.contender in alone
    arguments = StepArguments(model="org/model", **fields)
    return CaseResult({**arguments.cases()[0], "device": "cpu"}, rows, ["self-distillation", "distillation"])


def shown(name, result):
    console = Console(width=200, record=True, force_terminal=False)
    console.print(REPORTS[name].table(result))
    return console.export_text()


def cells(text, contender):
    [line] = [line for line in text.splitlines() if line.startswith(f"│ {contender} ")]
    return [cell.strip() for cell in line.split("│")[1:-1]]


def bars_of(axes):
    """Name, start and length of each bar that is drawn, and its label."""
    names = [tick.get_text() for tick in axes.figure.axes[0].get_yticklabels()]  # of the shared axis
    texts = [text.get_text() for text in axes.texts]
    bars = [bar for container in axes.containers for bar in container]
    assert len(bars) == len(texts)
    return [
        (names[round(bar.get_y() + bar.get_height() / 2)], bar.get_x(), bar.get_width(), text)
        for bar, text in zip(bars, texts, strict=True)
    ]


def points_of(axes):
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_loss_table():
    [case] = LossArguments().cases()
    text = shown("loss", loss_result(case))
    assert cells(text, "dense") == ["dense", "4.000", "4.000 … 5.000", "4.00×", "2.00×", "900", "–", ""]
    assert cells(text, "floor") == ["floor", "1.000", "1.000 … 1.000", "1.00×", "0.50×", "–", "–", ""]
    assert cells(text, "ours-eager")[6] == "eager"
    assert "does not run here: it cannot clip" in cells(text, "liger")
    assert "V = 151,936" in text


def test_step_table():
    text = shown("step", step_result())
    own = ["2.000", "2.000 … 2.000", "1.00×", "0.250", "0.500", "1.000", "0.250", "9.000", "256", "1,024", "2,048", ""]
    assert cells(text, "self-distillation") == ["self-distillation", *own]
    assert cells(text, "distillation")[1:4] == ["4.000", "4.000 … 4.000", "2.00×"]
    assert "does not run here: ImportError: no" in cells(text, "sdft")
    assert "4 given rollouts of 128 tokens" in text
    assert "reads what the others read" in " ".join(text.split())
    assert "The contenders took turns." in " ".join(text.split())


def test_step_table_of_sampled_rollouts():
    text = shown("step", step_result(sample=True, num_generations=2, equal_teacher_tokens=False))
    assert cells(text, "self-distillation")[:4] == ["self-distillation", "3.000", "1.000", "2.000"]
    assert "4 sampled rollouts (2 of each prompt) of 128 tokens" in text
    assert "reads the student's prompt" in " ".join(text.split())


@pytest.mark.parametrize(
    ("alone", "said"),
    [
        (["self-distillation", "sdft", "distillation"], "The contenders ran one after the other."),
        (["distillation"], "The contenders took turns, but for distillation: beside the others, memory was short."),
    ],
)
def test_who_was_alone_is_said(alone, said):
    assert said in " ".join(shown("step", step_result(alone)).split())


def test_loss_bars():
    [case] = LossArguments().cases()
    figure = REPORTS["loss"].plot([loss_result(case)])
    time_axes, memory_axes = figure.axes
    assert bars_of(time_axes) == [
        ("ours-eager", 0.0, 2.0, "2.000"),
        ("dense", 0.0, 4.0, "4.000"),
        ("floor", 0.0, 1.0, "1.000"),
    ]
    assert bars_of(memory_axes) == [("ours-eager", 0.0, 3.0, "3"), ("dense", 0.0, 900.0, "900")]
    [floor] = time_axes.lines
    assert list(floor.get_xdata()) == [1.0, 1.0]
    assert time_axes.get_xlabel() == "median seconds"
    assert memory_axes.get_xlabel() == "peak extra MiB"
    assert "V = 151,936" in figure.get_suptitle()


def test_loss_lines():
    cases = LossArguments(num_tokens=[1024, 256]).cases()
    time_axes, memory_axes = REPORTS["loss"].plot([loss_result(case, case["num_tokens"] / 256) for case in cases]).axes
    assert points_of(time_axes) == {
        "ours-eager": [(256, 2.0), (1024, 8.0)],
        "dense": [(256, 4.0), (1024, 16.0)],
        "floor": [(256, 1.0), (1024, 4.0)],
    }
    assert points_of(memory_axes) == {"ours-eager": [(256, 3.0), (1024, 3.0)], "dense": [(256, 900.0), (1024, 900.0)]}
    for axes in (time_axes, memory_axes):
        assert axes.get_xlabel() == "tokens N"
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["256", "1,024"]
        assert len({line.get_color() for line in axes.lines}) == len(axes.lines)


def test_a_contender_without_a_result_has_no_point():
    cases = LossArguments(num_tokens=[256, 1024]).cases()
    results = [loss_result(case) for case in cases]
    results[1].rows[1] = Row("dense", error="does not run here: OutOfMemoryError")
    figure = REPORTS["loss"].plot(results)
    assert points_of(figure.axes[0])["dense"] == [(256, 4.0)]
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ours-eager", "dense", "floor"]


def panels(figure):
    return [(axes.get_xlabel(), axes.get_title(loc="left"), points_of(axes)["floor"]) for axes in figure.axes[::2]]


def test_of_all_combinations_the_longest_sweep_is_the_axis():
    cases = LossArguments(num_tokens=[256, 1024], vocab_size=[32000, 64000, 128000]).cases()
    first, second = panels(REPORTS["loss"].plot([loss_result(case) for case in cases]))
    assert first[0] == second[0] == "vocabulary V"
    assert "N = 256, H = 1,024" in first[1]
    assert "N = 1,024, H = 1,024" in second[1]
    assert [x for x, _ in first[2]] == [x for x, _ in second[2]] == [32000, 64000, 128000]


def test_sizes_varied_one_at_a_time_have_a_panel_each():
    cases = LossArguments(
        num_tokens=[1024, 256, 4096], vocab_size=[64000, 32000], hidden_size=[64, 128, 32], one_at_a_time=True
    ).cases()
    sizes = [(case["num_tokens"], case["hidden_size"], case["vocab_size"]) for case in cases]
    assert sorted(sizes) == [
        (256, 64, 64000),
        (1024, 32, 64000),
        (1024, 64, 32000),
        (1024, 64, 64000),
        (1024, 128, 64000),
        (4096, 64, 64000),
    ]
    drawn = panels(REPORTS["loss"].plot([loss_result(case) for case in cases]))
    assert [(label, [x for x, _ in points]) for label, _, points in drawn] == [
        ("tokens N", [256, 1024, 4096]),
        ("hidden size H", [32, 64, 128]),
        ("vocabulary V", [32000, 64000]),
    ]


@pytest.mark.parametrize("sampled", [False, True])
def test_step_bars(sampled):
    figure = REPORTS["step"].plot([step_result(sample=sampled)])
    time_axes, memory_axes = figure.axes
    parts = ({"generation": 1.0} if sampled else {}) | PARTS
    assert [container.get_label() for container in time_axes.containers] == list(parts)
    expected, start = [], 0.0
    for seconds in parts.values():
        expected += [("self-distillation", start, seconds), ("distillation", 2 * start, 2 * seconds)]
        start += seconds
    assert [bar[:3] for bar in bars_of(time_axes)] == expected
    assert [bar[3] for bar in bars_of(time_axes) if bar[2] == 2.0] == ["2.000"] * len(
        [bar for bar in expected if bar[2] == 2.0]
    )
    assert bars_of(memory_axes) == [
        ("self-distillation", 0.0, 256.0, "256"),
        ("distillation", 0.0, 256.0, "256"),
        ("self-distillation", 256.0, 1024.0, "1,024"),
        ("distillation", 256.0, 1024.0, "1,024"),
    ]
    assert figure.get_suptitle().startswith("model, all weights, jsd, 4 ")


def test_teacher_bars():
    rows = [
        Row(name, [{"seconds": 2.0}], {"peak_extra_bytes": 2**20}) for name in ("shared-prompt", "whole-sequences")
    ]
    case = {**TeacherArguments(model="org/model").cases()[0], "device": "cpu"}
    time_axes, memory_axes = REPORTS["teacher"].plot([CaseResult(case, rows, [])]).axes
    assert bars_of(time_axes) == [(name, 0.0, 2.0, "2.000") for name in ("shared-prompt", "whole-sequences")]
    assert bars_of(memory_axes) == [(name, 0.0, 1.0, "1") for name in ("shared-prompt", "whole-sequences")]


def test_every_contender_has_a_colour():
    for arguments in (LossArguments, TeacherArguments):
        assert set(arguments.all_contenders) <= set(_COLORS)


def test_later_rows_replace_those_of_the_same_contender():
    [case] = LossArguments().cases()
    result = CaseResult(case, [], []).with_rows([Row("a", error="no memory"), Row("b")], ["b"])
    again = result.with_rows([Row("a", [{"seconds": 1.0}])], ["a"])
    assert [row.contender for row in again.rows] == ["a", "b"]
    assert again.rows[0].error is None
    assert again.order == ["b", "a"]
    assert result.rows[0].error == "no memory"


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
        "facts": {"peak_extra_bytes": 3 * 2**20, "kernel": "eager"},
        "error": None,
        "no_memory": False,
        "alone": False,
        "median": {"seconds": 2.0},
    }
    assert failed["error"] == "does not run here: it cannot clip"
    assert failed["median"] is None
