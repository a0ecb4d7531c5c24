"""
The comparison from the command line:

    python -m trl_opsd.comparison
    python -m trl_opsd.comparison --quick
"""

import sys
from pathlib import Path

from ..experiment.command import Command
from .arms import FULL, QUICK
from .report import write_report


COMMAND = Command(
    name="methods",
    module="trl_opsd.comparison",
    description="Compares all methods, TRL's GRPO and SFT, and controls on embedded tasks, with as many generated "
    "tokens, and writes the page.",
    full=FULL,
    quick=QUICK,
    quick_help="a few arms, two seeds, a third of the tokens, nothing tuned",
    page=Path("docs/methods_compared.md"),
    report=write_report,
)


if __name__ == "__main__":
    sys.exit(COMMAND.main())
