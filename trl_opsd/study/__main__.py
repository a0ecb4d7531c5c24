"""
The study from the command line, resumable run by run:

    python -m trl_opsd.study
    python -m trl_opsd.study --quick
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from .arms import ARMS
from .report import write_report
from .runner import FULL, PROCESSES, QUICK, Plan, Results, measured_ratio, planned_seconds, run_study


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the study's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m trl_opsd.study",
        description="Puts published claims about self-distillation to the test on embedded tasks, and writes the "
        "report. Downloads nothing. Started again, it goes on with the runs that are missing or failed.",
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="a few arms, two seeds, half the steps, nothing tuned")
    parser.add_argument("--only", nargs="+", metavar="ARM", choices=list(ARMS), help="these arms, with their bases")
    parser.add_argument("--max_hours", type=float, help="hours after which no run is started any more")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="print runs and costs, and run nothing")
    what.add_argument("--report", action="store_true", help="write the report from what is there, and run nothing")
    parser.add_argument("--output_dir", type=Path, help="where results go (default: outputs/study or study-quick)")
    parser.add_argument("--page", type=Path, help="the report (default: docs/study.md; quick: in the output folder)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs the study from the command line.

    Returns:
        `int`:
            Exit status: 0, 2 if something is wrong with the folder or the disk, 130 if interrupted.
    """
    args = make_parser().parse_args(argv)
    try:
        _study(args, Console())
    except (ValueError, OSError) as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("study: interrupted. Finished runs are kept: the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _study(args: argparse.Namespace, console: Console) -> None:
    plan = QUICK if args.quick else FULL
    running = replace(plan, arms=tuple(args.only)) if args.only else plan
    folder = args.output_dir or Path("outputs") / ("study-quick" if args.quick else "study")
    page = args.page or (folder / "study.md" if args.quick else Path("docs/study.md"))
    results = Results(folder)
    print_plan(running, results, console)
    if args.plan:
        return
    if not args.report:
        results = run_study(running, folder, args.max_hours, console)
    page.parent.mkdir(parents=True, exist_ok=True)
    for verdict in write_report(results, plan, page):
        console.print(f"{verdict.claim} ({verdict.base} base): [bold]{verdict.outcome}[/bold]", highlight=False)
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


if __name__ == "__main__":
    sys.exit(main())
