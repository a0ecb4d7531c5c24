"""Asking on several processes at once, each of which may have more questions than others, or fail."""

from collections.abc import Callable, Sequence
from typing import Any

from ..serving import ServerError


class BatchError(ValueError):
    """What a batch is made of cannot be used. Every process raises it, and training ends after a checkpoint."""


Gather = Callable[[list[Any]], list[Any]]
"""From a list of each process to the list of all."""


def together(function: Callable[[], list[Any]], gather: Gather) -> list[Any]:
    """
    Call a function of each process, in which any may fail: then all do, so that none waits for another.

    Args:
        function (`Callable`):
            The function.
        gather (`Callable`):
            Collects from all processes.

    Raises:
        ServerError: If a server failed on any process.
        BatchError: If the function raised something else on any.
    """
    values, error = [], None
    try:
        values = function()
    except Exception as caught:
        error = caught
    failures = gather([None if error is None else (isinstance(error, ServerError), str(error) or repr(error))])
    for is_server, message in filter(None, failures):
        raise (ServerError if is_server else BatchError)(message) from error
    return values


def sample_once(
    prompts: Sequence[list[int] | None],
    sample: Callable[[list[list[int]]], list[list[int]]],
    gather: Gather,
    stand_in: list[int],
) -> list[list[int] | None]:
    """
    Sample from prompts of all processes in one call, in which each has as many. Equal prompts share what was sampled.

    Args:
        prompts (`Sequence[list[int] | None]`):
            Token ids of a prompt for each row of this process, `None` for rows without one.
        sample (`Callable`):
            Gives the completions of some prompts, and is called by all processes or by none.
        gather (`Callable`):
            Collects from all processes.
        stand_in (`list[int]`):
            Prompt for a process that has fewer than others.

    Returns:
        `list[list[int] | None]`: token ids for each row, `None` for rows without a prompt.
    """
    distinct = list(dict.fromkeys(tuple(ids) for ids in prompts if ids is not None))
    most = max(gather([len(distinct)]))
    if most == 0:
        return [None] * len(prompts)
    asked = [*map(list, distinct), *[stand_in] * (most - len(distinct))]
    answers = dict(zip(distinct, sample(asked)[: len(distinct)], strict=True))
    return [None if ids is None else answers[tuple(ids)] for ids in prompts]
