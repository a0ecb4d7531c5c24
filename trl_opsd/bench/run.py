"""One benchmark from its arguments to its table, its numbers and its plot."""

import os
import platform
import sys
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..help import versions_of
from .arguments import BenchArguments, StepArguments
from .measure import release_memory
from .models import save_config, save_model
from .report import REPORTS, CaseResult, write_json
from .runner import Contenders, Row


_PACKAGES = ("trl-opsd", "torch", "transformers", "trl", "peft", "accelerate", "liger-kernel", "triton")


def find_device(name: str) -> str:
    """
    Finds the device to measure on.

    Args:
        name (`str`):
            `"auto"`, `"cpu"` or `"cuda"`.

    Returns:
        `str`:
            `"cpu"` or `"cuda"`.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device=cuda` needs a GPU that PyTorch can use, and there is none. Use `cpu`.")
    return name


def run(arguments: BenchArguments, folder: Path, device: str, command: str) -> int:
    """
    Measures, and writes `results.json` and `plot.png`.

    Args:
        arguments ([`BenchArguments`]):
            Fields of the benchmark.
        folder (`Path`):
            Where the results go.
        device (`str`):
            `"cpu"` or `"cuda"`.
        command (`str`):
            Command line, for the record.

    Returns:
        `int`:
            Exit status.
    """
    # Where there is no terminal, its width would be taken for 80 columns
    console = Console(width=None if sys.stdout.isatty() else 200)
    contenders = arguments.contenders
    assert contenders is not None
    cases = [_completed(case, arguments, folder, device) for case in arguments.cases()]
    commands = ["memory"]
    if getattr(arguments, "check", False):
        commands.append("check")

    report = REPORTS[arguments.name]
    results = [CaseResult(case, [], []) for case in cases]
    record = {
        "benchmark": arguments.name,
        "command": command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "repeats": arguments.repeats,
        "warmups": arguments.warmups,
        "device": describe_device(device),
        "versions": versions(),
    }
    # What an earlier run left would be taken for this one's, should it be interrupted
    write_json(folder / "results.json", record, [])
    (folder / "plot.png").unlink(missing_ok=True)
    rounds = 1 + arguments.warmups + arguments.repeats + len(commands)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    trains = isinstance(arguments, StepArguments)
    takes_turns = not (isinstance(arguments, StepArguments) and (arguments.sequential or arguments.use_vllm))
    groups = [contenders] if takes_turns else [[name] for name in contenders]
    with progress:
        task = progress.add_task("", total=len(cases) * rounds * len(contenders))
        turns_before = count()

        def on_turn(phase: str, name: str) -> None:
            progress.update(task, description=f"{phase}: {name}", completed=next(turns_before))

        def keep(number: int, rows: list[Row], order: list[str]) -> list[CaseResult]:
            kept = [*results[:number], results[number].with_rows(rows, order), *results[number + 1 :]]
            write_json(folder / "results.json", record, [result for result in kept if result.rows])
            return kept

        while groups:
            names = groups.pop(0)
            with Contenders(arguments.factory, names, folder / "logs", arguments.threads, arguments.timeout) as group:
                for number, case in enumerate(cases):
                    # Kept after every round: whatever happens to the rest, it has not been for nothing
                    rows, order = group.run_case(
                        case, arguments.repeats, arguments.warmups, commands, on_turn, partial(keep, number)
                    )
                    results = keep(number, rows, order)
                    if trains and len(names) > 1:
                        # Trainers hold their memory between their turns
                        groups += [[row.contender] for row in rows if row.lacked_memory()]
                    if not groups:
                        console.print(report.table(results[number]))

    if arguments.repeats < 5:
        console.print(f"With `repeats={arguments.repeats}` these are no medians to quote: use 5 or more.")
    console.print(f"Numbers: {folder / 'results.json'}")
    if not any(row.median() is not None for result in results for row in result.rows):
        console.print(f"No contender could be measured. What they printed is in {folder / 'logs'}.")
        return 1
    if find_spec("matplotlib") is None:
        console.print("No plot was drawn: it needs `pip install matplotlib`.")
    else:
        report.plot(results).savefig(folder / "plot.png", dpi=120)
        console.print(f"Plot:    {folder / 'plot.png'}")
    return 0


def _completed(case: dict[str, Any], arguments: BenchArguments, folder: Path, device: str) -> dict[str, Any]:
    """A case with what depends on the device, and with a model."""
    case = {**case, "device": device}
    if case["dtype"] == "auto":
        case["dtype"] = "bfloat16" if device == "cuda" else "float32"
    if isinstance(arguments, StepArguments):
        case["output_dir"] = str(folder / "trainer")
    if "preset" in case:
        preset = case.pop("preset")
        case["random_weights"] = case["model"] is None
        if case["model"] is None:
            model = folder / f"random-{preset}"
            save_config(model, preset)
            case["model"] = str(model)
            if case.get("use_vllm"):  # which loads them by itself
                save_model(model, device, case["dtype"], case["seed"])
                case["random_weights"] = False
                release_memory(torch.device(device))
    return case


def describe_device(device: str) -> dict[str, Any]:
    """
    Says what the numbers were measured on.

    Args:
        device (`str`):
            `"cpu"` or `"cuda"`.

    Returns:
        `dict[str, Any]`:
            Type and name of the device, number of CPU cores, and the system.
    """
    name = platform.processor() or platform.machine()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif (info := Path("/proc/cpuinfo")).is_file():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return {"type": device, "name": name, "cores": os.cpu_count(), "system": platform.system()}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter, `None` for those that are not installed."""
    return {"python": platform.python_version(), **versions_of(_PACKAGES)}
