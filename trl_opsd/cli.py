"""The `trl-opsd` command. Nothing heavy is imported until a command runs, so that help and version answer at once."""

import signal
import sys
from argparse import ArgumentParser, HelpFormatter
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from subprocess import CalledProcessError

from trl_opsd.files import recipes_folder
from trl_opsd.help import did_you_mean
from trl_opsd.methods import TRAINABLE, summary


_OTHER_COMMANDS = {
    "probe": "Measure, before training, what the self-teacher of a recipe knows more than its student.",
    "eval": "Sample answers to benchmarks, grade them and sum them up.",
    "compare": "What changed between two evaluated runs.",
    "report": "One page on a training run, or on several beside one another.",
    "generate": "Make a data set for `trl sft` or `trl dpo` from a model's own completions.",
    "inspect": "See what the teacher wants of every token of some rollouts, on one page.",
    "plan": "Say what a recipe takes on given GPUs: memory, time, and what to change where it does not fit.",
    "bench": "Measure the loss and the training step beside their peers.",
    "env": "Print the versions that a bug report should name.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments; those of the process if `None`.

    Returns:
        `int`:
            Exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(
        prog="trl-opsd",
        formatter_class=partial(HelpFormatter, max_help_position=28),
        description="On-policy self-distillation on top of TRL.",
        epilog="A training command starts `accelerate launch`: trl-opsd opsd --config recipe.yaml "
        "[--accelerate_config zero3] [--num_processes 2] [--any_field value]. `trl-opsd opsd --help` explains every "
        "field.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, help in ({name: summary(name) for name in TRAINABLE} | _OTHER_COMMANDS).items():
        commands.add_parser(name, help=help.replace("%", "%%"), add_help=name == "env")
    if argv and not argv[0].startswith("-") and argv[0] not in commands.choices:
        print(
            f"trl-opsd: error: unknown command `{argv[0]}`. {did_you_mean(argv[0], commands.choices)}", file=sys.stderr
        )
        return 2

    args = parser.parse_args(argv[:1])
    command = args.command
    if args.version:
        print(version("trl-opsd"))
        return 0
    if command is None:
        parser.print_help()
        return 0
    if command == "probe":
        from trl_opsd.scripts.probe import main as probe

        return probe(argv[1:])
    if command == "eval":
        from trl_opsd.scripts.eval import main as evaluate

        return evaluate(argv[1:])
    if command == "compare":
        from trl_opsd.scripts.compare import main as compare

        return compare(argv[1:])
    if command == "report":
        from trl_opsd.scripts.report import main as report

        return report(argv[1:])
    if command == "generate":
        from trl_opsd.scripts.generate import main as generate

        return generate(argv[1:])
    if command == "inspect":
        from trl_opsd.scripts.inspect import main as inspect

        return inspect(argv[1:])
    if command == "plan":
        from trl_opsd.scripts.plan import main as plan

        return plan(argv[1:])
    if command == "bench":
        from trl_opsd.bench.command import main as bench

        return bench(argv[1:])
    if command == "env":
        parser.parse_args(argv)
        from trl_opsd.scripts.env import print_env

        print_env()
        return 0
    try:
        return _train(command, argv[1:])
    except KeyboardInterrupt:
        _wait_for_children()
    except Exception as error:  # what torch's launcher makes of an interrupt, after it has ended its processes
        if getattr(error, "sigval", None) != signal.SIGINT:
            raise
    print(
        f"trl-opsd {command}: interrupted. `--resume_from_checkpoint auto` goes on from the last checkpoint, if there "
        "is one.",
        file=sys.stderr,
    )
    return 130


def _train(command: str, args: Sequence[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser

    from trl_opsd.scripts.train import make_parser

    parser = make_parser(command, prog=f"trl-opsd {command}")
    launcher = launch_command_parser()
    try:
        script_args, launch_args = parser.split_args(args)
        launch_flags = {"--accelerate_config", *launcher._option_string_actions}
        for position, arg in enumerate(launch_args):
            if (position == 0 or arg.startswith("-")) and arg.partition("=")[0] not in launch_flags:
                raise ValueError(parser.explain_unknown(arg))
        # As a module, not as a file: a file would make its neighbours importable as `env` and `utils`.
        module = "trl_opsd.scripts.train"
        launch_args = _resolve_accelerate_config(launch_args)
        launch = launcher.parse_args([*launch_args, "--module", module, command, *script_args])
        if launch.training_script != module:
            raise ValueError(parser.explain_unknown(launch.training_script))
        # Only the names and types of the fields are checked here. Their values may depend on the number of processes,
        # and are checked in those.
        parser.dataclass_types = []
        parser.parse_args_and_config(script_args)
    except (ValueError, OSError) as error:
        print(f"trl-opsd {command}: error: {error}", file=sys.stderr)
        return 2
    try:
        launch_command(launch)
    except CalledProcessError as error:
        # The process has already shown what went wrong.
        return error.returncode
    return 0


def _wait_for_children() -> None:
    """Leave the last word to nobody else. Processes that were not interrupted with this one are ended."""
    import psutil

    _, alive = psutil.wait_procs(psutil.Process().children(), timeout=10)
    for process in alive:
        process.terminate()
    psutil.wait_procs(alive)


def _resolve_accelerate_config(launch_args: Sequence[str]) -> list[str]:
    """Replace `--accelerate_config name_or_path` by accelerate's `--config_file path`."""
    resolved: list[str] = []
    args = iter(launch_args)
    for arg in args:
        flag, is_assigned, name = arg.partition("=")
        if flag != "--accelerate_config":
            resolved.append(arg)
            continue
        name = name if is_assigned else next(args, "")
        if Path(name).is_file():
            path = Path(name)
        else:
            folder = recipes_folder() / "accelerate"
            path = folder / f"{name}.yaml"
            if not name or not path.is_file():
                known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
                raise ValueError(f"`--accelerate_config {name}` is neither a file nor one of: {known}.")
        resolved += ["--config_file", str(path)]
    return resolved


if __name__ == "__main__":
    raise SystemExit(main())
