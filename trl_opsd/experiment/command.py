"""The command line of what is run by a plan, resumable run by run."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from .runner import PROCESSES, Plan, Results, measured_ratio, planned_seconds, run_plan


@dataclass(frozen=True)
class Command:
    """
    A command that runs a plan and writes its report.

    Args:
        name (`str`):
            What errors and the output folder are called.
        module (`str`):
            Module it is started as.
        description (`str`):
            What it does.
        full ([`~trl_opsd.experiment.runner.Plan`]):
            What it runs.
        quick ([`~trl_opsd.experiment.runner.Plan`]):
            What it runs with `--quick`.
        quick_help (`str`):
            What that is.
        page (`Path`):
            The report.
        report (`Callable[[Results, Plan, Path], list[str]]`):
            Writes it from what results there are, and returns lines for the console.
    """

    name: str
    module: str
    description: str
    full: Plan
    quick: Plan
    quick_help: str
    page: Path
    report: Callable[[Results, Plan, Path], list[str]]

    def parser(self) -> argparse.ArgumentParser:
        """Makes the parser of the arguments."""
        parser = argparse.ArgumentParser(
            prog=f"python -m {self.module}",
            description=f"{self.description} Downloads nothing. Started again, it goes on with the runs that are "
            "missing or failed.",
            allow_abbrev=False,
        )
        parser.add_argument("--quick", action="store_true", help=self.quick_help)
        parser.add_argument(
            "--only", nargs="+", metavar="ARM", choices=list(self.full.known), help="these arms, with their bases"
        )
        parser.add_argument("--max_hours", type=float, help="hours after which no run is started any more")
        parser.add_argument(
            "--processes", type=int, default=PROCESSES, help=f"runs at a time, a core each (default: {PROCESSES})"
        )
        what = parser.add_mutually_exclusive_group()
        what.add_argument("--plan", action="store_true", help="print runs and costs, and run nothing")
        what.add_argument("--report", action="store_true", help="write the report from what is there, and run nothing")
        parser.add_argument(
            "--output_dir",
            type=Path,
            help=f"where results go (default: {self.folder}; quick: outputs/{self.name}-quick)",
        )
        parser.add_argument(
            "--page", type=Path, help=f"the report (default: {self.page}; quick: in the output folder)"
        )
        return parser

    @property
    def folder(self) -> Path:
        """Where the results of the full plan go."""
        return Path("outputs") / self.name

    def places(self, args: argparse.Namespace) -> tuple[Path, Path]:
        """Folder of the results and file of the report, as the arguments say."""
        folder = args.output_dir or (Path("outputs") / f"{self.name}-quick" if args.quick else self.folder)
        return folder, args.page or (folder / self.page.name if args.quick else self.page)

    def plan(self, args: argparse.Namespace) -> Plan:
        """What the arguments ask for."""
        return self.quick if args.quick else self.full

    def main(self, argv: Sequence[str] | None = None) -> int:
        """
        Runs the plan from the command line.

        Returns:
            `int`:
                Exit status: 0, 2 if something is wrong with the folder or the disk, 130 if interrupted.
        """
        args = self.parser().parse_args(argv)
        try:
            self._run(args, Console())
        except (ValueError, OSError) as error:
            print(f"{self.name}: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(
                f"{self.name}: interrupted. Finished runs are kept: the same command goes on from here.",
                file=sys.stderr,
            )
            return 130
        return 0

    def _run(self, args: argparse.Namespace, console: Console) -> None:
        if args.processes < 1:
            raise ValueError(f"`--processes` must be at least 1, got {args.processes}.")
        plan = self.plan(args)
        running = replace(plan, arms=tuple(args.only)) if args.only else plan
        folder, page = self.places(args)
        results = Results(folder)
        print_plan(running, results, console)
        if args.plan:
            return
        if not args.report:
            results = run_plan(running, folder, args.max_hours, console, processes=args.processes)
        page.parent.mkdir(parents=True, exist_ok=True)
        for line in self.report(results, plan, page):
            console.print(line, highlight=False)
        console.print(f"Report: {page}")


def print_plan(plan: Plan, results: Results, console: Console) -> None:
    """Prints how many runs there are, and what they cost by the costs that were measured."""
    phases = planned_seconds(plan)
    for name, (number, seconds) in phases.items():
        console.print(f"{name}: {number} runs, {seconds / 3600:.1f} core-hours", highlight=False)
    hours = sum(seconds for _, seconds in phases.values()) / 3600
    console.print(
        f"in all: {hours:.1f} core-hours, {hours / PROCESSES:.1f} hours on {PROCESSES} cores", highlight=False
    )
    ratio = measured_ratio(plan, results)
    if ratio is not None:
        console.print(f"runs finished so far took {ratio:.2f} times what was planned for them", highlight=False)
