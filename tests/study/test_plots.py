import pytest
from study.made import result

from trl_opsd.study.arms import ARMS
from trl_opsd.study.plots import PLOTS


to_rgb = pytest.importorskip("matplotlib.colors").to_rgb


def draw(family, name, runs):
    [found] = [draw for plot, _, draw in PLOTS[family] if plot == name]
    return found(runs, "Title")


def made(*curves, tokens=40.0):
    return {seed: result(curve=curve, tokens=tokens) for seed, curve in enumerate(curves, start=1)}


def curves(axes):
    """What is drawn per label: the line, and the ends of the band at each x."""
    drawn = {}
    for line, band in zip(axes.lines, axes.collections, strict=True):
        ends = {}
        for x, y in band.get_paths()[0].vertices.tolist():
            ends.setdefault(x, []).append(y)
        xs, ys = line.get_data()
        drawn[line.get_label()] = {x: (min(ends[x]), y, max(ends[x])) for x, y in zip(xs, ys, strict=True)}
    return drawn


def near(points):
    return {x: pytest.approx(values) for x, values in points.items()}


def test_accuracy_is_a_line_of_means_in_a_band_of_the_seeds():
    runs = {
        "opsd": made((0.1, 0.4, 0.5), (0.2, 0.6, 0.7)),
        "grpo": made((0.1, 0.3)),
        "opsd_long": made((0.1, 0.9)),  # has a plot of its own
    }
    [axes] = draw("adding", "accuracy", runs).axes
    assert curves(axes) == {
        ARMS["opsd"].title: near({0: (0.1, 0.15, 0.2), 1000: (0.4, 0.5, 0.6), 2000: (0.5, 0.6, 0.7)}),
        ARMS["grpo"].title: near({0: (0.1, 0.1, 0.1), 1000: (0.3, 0.3, 0.3)}),
    }
    assert axes.get_title() == "Title"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("generated tokens", "accuracy on held-out problems")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [ARMS["opsd"].title, ARMS["grpo"].title]
    assert len({line.get_color() for line in axes.lines}) == 2
    for line, band in zip(axes.lines, axes.collections, strict=True):
        assert tuple(band.get_facecolor()[0][:3]) == pytest.approx(to_rgb(line.get_color()))


def test_long_runs_are_drawn_over_steps():
    [axes] = draw("adding", "long", {"opsd": made((0.1, 0.4)), "opsd_long": made((0.1, 0.9))}).axes
    assert curves(axes) == {ARMS["opsd_long"].title: near({0: (0.1, 0.1, 0.1), 10: (0.9, 0.9, 0.9)})}
    assert axes.get_xlabel() == "optimizer step"


def test_brevity_draws_lengths_and_accuracy():
    runs = {"opsdc_50": made((0.9, 0.8), tokens=30.0), "opsdc_1": made((0.9, 0.5), tokens=20.0)}
    [lengths] = draw("brevity", "tokens", runs).axes
    assert {label: points[1000] for label, points in curves(lengths).items()} == {
        ARMS["opsdc_50"].title: (30.0, 30.0, 30.0),
        ARMS["opsdc_1"].title: (20.0, 20.0, 20.0),
    }
    assert lengths.get_ylabel() == "tokens per answer"
    [accuracy] = draw("brevity", "accuracy", runs).axes
    assert {label: points[1000][1] for label, points in curves(accuracy).items()} == {
        ARMS["opsdc_50"].title: 0.8,
        ARMS["opsdc_1"].title: 0.5,
    }


def test_arms_that_generate_nothing_have_no_curve_over_tokens():
    without = {1: {**result(), "curve": [{**point, "generated_tokens": 0} for point in result()["curve"]]}}
    assert draw("adding", "accuracy", {"sft": without}) is None
    [axes] = draw("adding", "accuracy", {"sft": without, "opsd": made((0.1, 0.4))}).axes
    assert list(curves(axes)) == [ARMS["opsd"].title]


def test_more_arms_than_colors_are_told_apart():
    arms = [arm for arm in ARMS if ARMS[arm].trainer != "none" and not arm.endswith("_long")][:20]
    [axes] = draw("adding", "accuracy", {arm: made((0.1, 0.4)) for arm in arms}).axes
    styles = [(line.get_color(), line.get_linestyle()) for line in axes.lines]
    assert len(set(styles)) == len(styles) == 20
