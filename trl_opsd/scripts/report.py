"""`trl-opsd report`: one page on a training run, or on several beside one another."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path


def make_parser() -> ArgumentParser:
    """
    Makes the parser of the command.

    Returns:
        [`~argparse.ArgumentParser`]:
            The parser.
    """
    parser = ArgumentParser(
        prog="trl-opsd report",
        description="Makes one self-contained page of a training run, finished or not: settings, what they differ "
        "from, curves, evaluations with their intervals, answers before and after, and what it cost in tokens, time "
        "and memory. Several runs stand beside one another, with what differs between them.",
        epilog="docs/reports.md says where everything comes from, docs/metrics.md what the curves show.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="`output_dir` of a training run, or a checkpoint in it"
    )
    parser.add_argument(
        "--eval",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of runs of `trl-opsd eval` to show as well (those in the folder of a run always are)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write (default: report.html in the folder of the run, or of several runs in the one where you "
        "are)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """
    Makes a report.

    Args:
        argv (`Sequence[str]`):
            Arguments after `report`.

    Returns:
        `int`:
            Exit status: 0, 2 if there is nothing to report on, 130 if interrupted.
    """
    args = make_parser().parse_args(argv)
    try:
        target = report(args.runs, args.eval, args.output)
    except (ValueError, OSError) as error:
        print(f"trl-opsd report: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("trl-opsd report: interrupted. No page was written.", file=sys.stderr)
        return 130
    print(f"Written to {target}.")
    return 0


def report(folders: Sequence[Path], evaluations: Sequence[Path] = (), output: Path | None = None) -> Path:
    """
    Writes the report of runs.

    Args:
        folders (`Sequence[Path]`):
            Their folders.
        evaluations (`Sequence[Path]`, *optional*, defaults to `()`):
            Folders of `trl-opsd eval`.
        output (`Path`, *optional*):
            File to write.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: If a folder is no run, or matplotlib is not installed.
    """
    from trl_opsd.files import write_whole
    from trl_opsd.report.plots import check_matplotlib
    from trl_opsd.report.run_report import report_page
    from trl_opsd.report.runs import read_runs

    check_matplotlib()
    runs = read_runs(folders)
    target = output or (runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html"))
    write_whole(target, report_page(runs, target, evaluations))
    return target
