"""`trl-opsd bench`: the command line of the benchmarks."""

import shlex
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from transformers import HfArgumentParser

from ..help import did_you_mean
from .arguments import BenchArguments, LossArguments, StepArguments, TeacherArguments


_BENCHMARKS: dict[str, tuple[type[BenchArguments], str]] = {
    "loss": (LossArguments, "time and memory of the divergence and its gradients, from hidden states"),
    "step": (StepArguments, "time and memory of whole optimizer steps of trainers"),
    "teacher": (TeacherArguments, "time and memory of the teacher's pass over rollouts that share a prompt"),
}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def make_parser(name: str) -> HfArgumentParser:
    """
    Makes the parser of a benchmark.

    Args:
        name (`str`):
            `"loss"`, `"step"` or `"teacher"`.

    Returns:
        [`~transformers.HfArgumentParser`]:
            Parser into its arguments, such as [`LossArguments`].
    """
    arguments, help = _BENCHMARKS[name]
    return _Parser(
        [arguments],
        prog=f"trl-opsd bench {name}",
        usage="%(prog)s [--any_field value]",
        description=f"{help[0].upper()}{help[1:]}. Contenders: {', '.join(arguments.all_contenders)}. Each runs in a "
        "process of its own; they take turns, one iteration per round, and medians are reported.",
        allow_abbrev=False,
    )


def main(argv: Sequence[str]) -> int:
    """
    Runs a benchmark.

    Args:
        argv (`Sequence[str]`):
            Arguments after `bench`.

    Returns:
        `int`:
            Exit status: 0, 1 if no contender could be measured, 2 if the arguments are wrong.
    """
    overview = ArgumentParser(
        prog="trl-opsd bench",
        description="Measures this library beside its peers.",
        epilog="`trl-opsd bench loss --help` explains every field.",
    )
    benchmarks = overview.add_subparsers(dest="name", metavar="benchmark", required=True)
    for name, (_, help) in _BENCHMARKS.items():
        benchmarks.add_parser(name, help=help, add_help=False)
    if not argv:
        overview.print_help()
        return 0
    name = overview.parse_args(argv[:1]).name
    try:
        parser = make_parser(name)
        arguments, unknown = parser.parse_args_into_dataclasses(
            list(argv[1:]), return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            hint = did_you_mean(unknown[0], parser._option_string_actions, "There is none that comes close.")
            raise ValueError(f"unknown field `{unknown[0]}`. {hint}")
        folder = arguments.prepare_output_dir()

        from .run import find_device, run

        device = find_device(arguments.device)
    except (ValueError, OSError) as error:
        print(f"trl-opsd bench {name}: error: {error} (`--help` explains every field)", file=sys.stderr)
        return 2
    with _ended_in_order():
        try:
            return run(arguments, folder, device, shlex.join(["trl-opsd", "bench", *argv]))
        except KeyboardInterrupt:
            print(f"trl-opsd bench {name}: interrupted, no contender is left running", file=sys.stderr)
            return 130


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Takes a request to end like Ctrl-C, so that the contenders are ended too."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
