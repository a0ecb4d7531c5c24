"""What all plots share."""

from importlib.util import find_spec
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Told apart with any colour vision: blue, orange, green, purple of Okabe and Ito.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
GREY = "#9aa5b1"


def check_matplotlib() -> None:
    """
    Refuses to go on where nothing can be drawn.

    Raises:
        ValueError: Without matplotlib, naming the extra that has it.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("The plots need matplotlib: pip install 'trl-opsd[eval]'.")


def new_figure(width: float = 8, height: float = 4.5) -> "tuple[Figure, Axes]":
    """A figure with one plot, of a size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def add_legend(axes: "Axes") -> None:
    """A legend above the plot, where no data are."""
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
