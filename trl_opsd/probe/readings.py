"""What the teacher is asked to read: the recipe's own context, and what should help less."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..context import (
    NoContext,
    OtherSolutionContext,
    PrivilegedContext,
    ShuffledSolutionContext,
    TemplateContext,
)


if TYPE_CHECKING:
    from ..trainer.trainer import SelfDistillationTrainer

TEACHER, NONE, OTHER, SHUFFLED = "teacher", "none", "other_solution", "shuffled_solution"


@dataclass(frozen=True)
class Reading:
    """
    A way to read the rows.

    Args:
        name (`str`):
            `"teacher"` for the recipe's own context, or the name of a control.
        context ([`PrivilegedContext`], *optional*):
            What is read. `None` for the recipe's own.
    """

    name: str
    context: PrivilegedContext | None = None


def solution_column(context: PrivilegedContext) -> str | None:
    """
    The dataset column whose text a context shows as the solution.

    Args:
        context ([`PrivilegedContext`]):
            The context.

    Returns:
        `str`, *optional*: its column, `"solution"` if it shows several. `None` if it shows none, or reads rollouts.
    """
    if not isinstance(context, TemplateContext) or not context.columns:
        return None
    column = getattr(context, "column", None) or ("solution" if len(context.columns) > 1 else context.columns[0])
    return column if column in context.columns else None


def make_readings(trainer: "SelfDistillationTrainer") -> tuple[list[Reading], dict[str, str]]:
    """
    What can be read in a run.

    Args:
        trainer ([`SelfDistillationTrainer`]):
            Its context and its training set are used.

    Returns:
        `tuple[list[Reading], dict[str, str]]`: the readings, the recipe's own first, and for those that are not there,
        by name, why.
    """
    context: Any = trainer.context
    readings, column = [Reading(TEACHER), Reading(NONE, NoContext())], solution_column(context)
    if column is None:
        what = "reads rollouts" if getattr(context, "reads_rollouts", True) else "shows no column of the data set"
        why = f"the recipe's context, {type(context).__name__}, {what}, so that there is no solution to exchange"
        return readings, dict.fromkeys((OTHER, SHUFFLED), why)
    other = OtherSolutionContext(column, context.template)
    other.read_dataset(trainer.train_dataset)
    readings += [Reading(OTHER, other), Reading(SHUFFLED, ShuffledSolutionContext(column, context.template))]
    return readings, {}
