"""The plots of the study's report."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..experiment.arms import STEPS
from ..experiment.figures import Result
from ..experiment.plots import curves
from .arms import ARMS


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _curves(runs: Mapping[str, Mapping[int, Result]], title: str, name: str, x: str, label: str) -> "Figure | None":
    return curves({ARMS[arm].title: done for arm, done in runs.items()}, title, name, x, label)


def _usual(runs: Mapping[str, Mapping[int, Result]], long: bool) -> dict[str, Mapping[int, Result]]:
    return {arm: done for arm, done in runs.items() if (ARMS[arm].steps == 5 * STEPS) == long}


Draw = Callable[[Mapping[str, Mapping[int, Result]], str], "Figure | None"]

_ACCURACY = "accuracy on held-out problems"
PLOTS: dict[str, tuple[tuple[str, str, Draw], ...]] = {
    "adding": (
        (
            "accuracy",
            "Accuracy against generated tokens",
            lambda runs, title: _curves(_usual(runs, False), title, "accuracy", "generated_tokens", _ACCURACY),
        ),
        (
            "long",
            "Accuracy over 5 times the usual steps",
            lambda runs, title: _curves(_usual(runs, True), title, "accuracy", "step", _ACCURACY),
        ),
    ),
    "brevity": (
        (
            "tokens",
            "Length against generated tokens",
            lambda runs, title: _curves(runs, title, "mean_tokens", "generated_tokens", "tokens per answer"),
        ),
        (
            "accuracy",
            "Accuracy against generated tokens",
            lambda runs, title: _curves(runs, title, "accuracy", "generated_tokens", _ACCURACY),
        ),
    ),
}
