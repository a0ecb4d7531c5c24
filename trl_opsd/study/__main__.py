"""
The study from the command line:

    python -m trl_opsd.study
    python -m trl_opsd.study --quick
"""

import sys
from pathlib import Path

from ..experiment.command import Command
from ..experiment.runner import Plan, Results
from .arms import FULL, QUICK
from .report import write_report


def _report(results: Results, plan: Plan, page: Path) -> list[str]:
    return [
        f"{verdict.claim} ({verdict.base} base): [bold]{verdict.outcome}[/bold]"
        for verdict in write_report(results, plan, page)
    ]


COMMAND = Command(
    name="study",
    module="trl_opsd.study",
    description="Puts published claims about self-distillation to the test on embedded tasks, and writes the report.",
    full=FULL,
    quick=QUICK,
    quick_help="a few arms, two seeds, half the steps, nothing tuned",
    page=Path("docs/study.md"),
    report=_report,
)


if __name__ == "__main__":
    sys.exit(COMMAND.main())
