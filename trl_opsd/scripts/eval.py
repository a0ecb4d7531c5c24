"""`trl-opsd eval`: sample answers to benchmarks, grade them and sum them up."""

import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, cast

from trl_opsd.eval.arguments import EvalArguments
from trl_opsd.help import versions_of
from trl_opsd.report.plots import check_matplotlib
from trl_opsd.scripts.recipe import RecipeParser


if TYPE_CHECKING:
    from trl_opsd.eval.benchmark import Benchmark, Problem
    from trl_opsd.eval.chat import ChatFormat
    from trl_opsd.eval.metrics import Summary
    from trl_opsd.eval.run_folder import SampleFile
    from trl_opsd.eval.samples import Sample

# Fields that samples do not depend on, or that `problems.jsonl` tells more about
_NOT_SETTINGS = {
    "batch_size", "base_url", "preset", "num_samples", "limit", "benchmarks", "dataset_name", "dataset_config",
    "dataset_split", "question_column", "answer_column", "answer_type", "prompt_template", "chat_template_path",
    "output_dir", "overwrite",
}  # fmt: skip
_LISTED_UNGRADABLE = 10


def make_parser(prog: str | None = None) -> RecipeParser:
    """
    Makes the parser of the command.

    Args:
        prog (`str`, *optional*):
            Name of the program in help and errors.

    Returns:
        [`RecipeParser`]:
            Parser into [`~trl_opsd.eval.arguments.EvalArguments`].
    """
    return RecipeParser(
        [EvalArguments],
        prog=prog,
        usage="%(prog)s --model_name_or_path model --benchmarks name [name ...] [--any_field value] | --list",
        launch_hint="It has no meaning here: transformers runs in one process, and vLLM takes several GPUs with "
        "`--model_init_kwargs '{tensor_parallel_size: 8}'`.",
        description="Samples answers to benchmarks, grades them and sums them up. A run that was interrupted goes on "
        "where it stopped when it is started again with the same flags. So does a finished one with more samples "
        "(`--num_samples`), problems (`--limit`) or benchmarks. `--config file.yaml` reads any of the fields below "
        "from a file; flags take precedence. `--list` shows the benchmarks.",
    )


def main(argv: Sequence[str], prog: str = "trl-opsd eval") -> int:
    """
    Runs the command.

    Args:
        argv (`Sequence[str]`):
            Arguments.
        prog (`str`, *optional*, defaults to `"trl-opsd eval"`):
            Name of the program in help and errors.

    Returns:
        `int`:
            Exit status: 0, 2 if something is wrong with the arguments, the data, the disk or the engine, 130 if
            interrupted.
    """
    try:
        if "--list" in argv:
            _list_benchmarks()
            return 0
        (arguments,) = make_parser(prog).parse_args_and_config(argv)
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # of the engine, the device, an adapter or the scorer's process
        message = shorten(f"{type(error).__name__}: {error}", 500, placeholder=" ...")
        print(
            f"{prog}: error: {message} All finished samples are kept: the same command goes on from here, also with "
            "another `batch_size` or `gpu_memory_utilization`.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(
            f"{prog}: interrupted. All finished samples are kept: the same command goes on from here.", file=sys.stderr
        )
        return 130
    return 0


def run(arguments: EvalArguments) -> "list[Summary]":
    """
    Evaluates a model, or finishes an evaluation that was interrupted.

    Args:
        arguments ([`~trl_opsd.eval.arguments.EvalArguments`]):
            Fields of the evaluation.

    Returns:
        `list[Summary]`:
            Metrics of each benchmark.
    """
    from trl_opsd.eval.chat import ChatFormat
    from trl_opsd.eval.evaluate import evaluate
    from trl_opsd.eval.run_folder import SampleFile
    from trl_opsd.files import locked

    check_matplotlib()
    problems = {benchmark.name: benchmark.problems(arguments.limit) for benchmark in _benchmarks(arguments)}
    tokenizer = arguments.load_tokenizer()
    template = arguments.chat_template_path
    chat = ChatFormat(
        tokenizer,
        chat_template=None if template is None else Path(template).read_text(encoding="utf-8"),
        chat_template_kwargs=cast("dict[str, Any] | None", arguments.chat_template_kwargs),
        system_prompt=arguments.system_prompt,
        apply_chat_template=arguments.apply_chat_template,
    )
    folder = Path(str(arguments.output_dir))
    backend = None
    if arguments.backend == "vllm_server":
        backend = arguments.load_backend(tokenizer)  # its weights are among the settings
    served = getattr(backend, "root", None)
    if served not in (None, arguments.model_name_or_path):
        print(f"The server loaded {arguments.model_name_or_path} from {served}.")
    with locked(folder), ExitStack() as stack:
        _prepare(folder, arguments, problems, chat, served)
        files = {name: stack.enter_context(closing(SampleFile(folder / name / "samples.jsonl"))) for name in problems}
        done = {(name, sample.problem_id, sample.sample_index) for name in files for sample in files[name].samples}
        num_samples = cast(int, arguments.num_samples)
        wanted = {
            (name, problem.problem_id, index)
            for name in problems
            for problem in problems[name]
            for index in range(num_samples)
        }
        if not wanted <= done:
            for rows in problems.values():
                _check_references(rows)
            samples = evaluate(
                [problem for name in problems for problem in problems[name]],
                backend or arguments.load_backend(tokenizer),
                chat,
                arguments.sampling(),
                num_samples=num_samples,
                seed=arguments.seed,
                done=done,
            )
            _write(samples, files, len(wanted), len(wanted & done))
        return _sum_up(
            folder,
            {
                name: [sample for sample in file.samples if (name, sample.problem_id, sample.sample_index) in wanted]
                for name, file in files.items()
            },
        )


def _benchmarks(arguments: EvalArguments) -> "list[Benchmark]":
    from trl_opsd.eval.benchmark import Benchmark, load_benchmark

    if arguments.dataset_name is not None:
        template: dict[str, Any] = (
            {} if arguments.prompt_template is None else {"prompt_template": arguments.prompt_template}
        )
        folder_or_file = os.path.basename(os.path.abspath(arguments.dataset_name))
        return [
            Benchmark(
                name=re.sub(r"\.(jsonl?|csv|parquet)$", "", folder_or_file),
                dataset_name=arguments.dataset_name,
                dataset_config=arguments.dataset_config,
                dataset_split=arguments.dataset_split,
                question_column=arguments.question_column,
                answer_column=arguments.answer_column,
                answer_type=arguments.answer_type,
                **template,
            )
        ]
    benchmarks = [load_benchmark(name) for name in arguments.benchmarks or []]
    names = [benchmark.name for benchmark in benchmarks]
    if len(set(names)) < len(names):
        raise ValueError(f"`benchmarks` names one twice: {' '.join(names)}. Give each a `name` of its own.")
    return benchmarks


def _check_references(problems: "list[Problem]") -> None:
    from trl_opsd.eval.scorer import check_reference

    message = ""
    for problem in problems:
        try:
            check_reference(problem.reference, problem.answer_type)
            return
        except ValueError as error:
            message = message or str(error)
    raise ValueError(
        f"No reference answer of {problems[0].benchmark} can be read: {message} Name the column of the final answers "
        "in `answer_column`, or how they are to be compared in `answer_type`."
    )


def _prepare(
    folder: Path,
    arguments: EvalArguments,
    problems: "dict[str, list[Problem]]",
    chat: "ChatFormat",
    served: str | None,
) -> None:
    from trl_opsd.eval.run_folder import keep_problems, open_run
    from trl_opsd.eval.scorer import SCORER_VERSION

    fields = asdict(arguments)
    settings = {name: value for name, value in fields.items() if name not in _NOT_SETTINGS}
    settings |= arguments.engine_settings(served)
    settings["scorer_version"] = SCORER_VERSION
    others = {
        name: fields[name] for name in sorted(_NOT_SETTINGS - {"output_dir", "overwrite"} | {"model_init_kwargs"})
    }
    open_run(folder, settings, {"other_fields": others, "versions": _versions()}, arguments.overwrite)
    for name, rows in problems.items():
        keep_problems(folder / name / "problems.jsonl", map(chat.rendered, rows))


def _versions() -> dict[str, str]:
    packages = ("trl-opsd", "trl", "transformers", "torch", "peft", "vllm", "math-verify")
    return {package: version or "not installed" for package, version in versions_of(packages).items()}


def _write(samples: "Iterable[Sample]", files: "dict[str, SampleFile]", num_wanted: int, num_done: int) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left: {task.fields[left]}"),
    )
    started = time.monotonic()
    with Progress(*columns) as progress:
        task = progress.add_task("completions", total=num_wanted, completed=num_done, left="-")
        for count, sample in enumerate(samples, 1):
            try:
                files[sample.benchmark].append(sample)
            except OSError as error:
                raise ValueError(
                    f"Cannot write a sample of {sample.benchmark}: {error}. The {num_done + count - 1} samples before "
                    "it are kept: make room, and the same command goes on from here."
                ) from error
            # From the start, since completions come in batches: rich would judge by the pace within one
            left = (time.monotonic() - started) / count * (num_wanted - num_done - count)
            progress.update(task, advance=1, left=str(timedelta(seconds=round(left))))


def _sum_up(folder: Path, samples: "dict[str, list[Sample]]") -> "list[Summary]":
    import pyarrow
    import pyarrow.parquet
    from rich.console import Console

    from trl_opsd.eval.metrics import summarize
    from trl_opsd.eval.run_folder import write_json
    from trl_opsd.report.evaluation import budget_plot, length_plot, save_plots, show, summary_rows, to_markdown

    summaries = []
    console = Console()
    for name, rows in samples.items():
        summary = summarize(rows)
        ungradable = {row.problem_id: row.reference for row in rows if row.correct is None}
        uncompared = [
            {"problem_id": row.problem_id, "sample_index": row.sample_index, "answer": row.answer, "error": row.error}
            for row in rows
            if row.error is not None
        ]
        metrics = {"summary": summary, "ungradable": ungradable, "uncompared": uncompared}
        write_json(folder / name / "metrics.json", metrics)
        table = pyarrow.Table.from_pylist([asdict(row) for row in rows])
        pyarrow.parquet.write_table(table, folder / name / "samples.parquet")
        plots = {"lengths": length_plot({folder.name: [row.num_tokens for row in rows]})}
        if summary.accuracy_at_budget:
            plots["accuracy"] = budget_plot({folder.name: summary})
        save_plots(plots, folder / name)
        summaries.append(summary)
        if ungradable:
            shown = [f"{problem_id} ({reference})" for problem_id, reference in ungradable.items()]
            more = f" and {len(shown) - _LISTED_UNGRADABLE} more" if len(shown) > _LISTED_UNGRADABLE else ""
            console.print(
                f"{name}: reference answers that cannot be read, so that their problems count towards no accuracy "
                f"({len(shown)}, all in metrics.json): {', '.join(shown[:_LISTED_UNGRADABLE])}{more}",
                style="yellow",
                markup=False,
            )
        if uncompared:
            console.print(
                f"{name}: {len(uncompared)} answers could not be compared with the reference and count as wrong. They "
                "are listed in metrics.json.",
                style="yellow",
            )
    overview = summary_rows(folder.name, summaries)
    (folder / "summary.md").write_text(to_markdown(overview), encoding="utf-8")
    show(overview, console)
    console.print(f"Samples, metrics and the table are in {folder}.", markup=False)
    return summaries


def _list_benchmarks() -> None:
    from rich.console import Console
    from rich.table import Table

    from trl_opsd.eval.benchmark import benchmark_names, load_benchmark

    table = Table("name", "what")
    table.add_column("source", overflow="fold", min_width=24)
    table.add_column("licence")
    for benchmark in map(load_benchmark, benchmark_names()):
        path = Path(benchmark.dataset_name)
        name = path.name if path.exists() else benchmark.dataset_name
        source = " ".join(filter(None, [name, benchmark.dataset_config, benchmark.dataset_split]))
        table.add_row(benchmark.name, benchmark.description, source, benchmark.licence)
    Console().print(table)
