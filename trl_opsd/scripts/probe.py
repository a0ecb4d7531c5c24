"""`trl-opsd probe`: what a recipe's self-teacher knows more than its student, before any training."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, cast

from trl_opsd.help import help_from_docstring
from trl_opsd.methods import TRAINABLE, config_class, method_of_recipe
from trl_opsd.scripts.recipe import RecipeParser


if TYPE_CHECKING:
    from datasets import Dataset
    from trl import DatasetMixtureConfig, ModelConfig

    from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer
    from trl_opsd.probe.measure import Question
    from trl_opsd.scripts.inputs import SelfDistillationScriptArguments

# What completions and scores depend on, of the fields of a recipe
_SETTINGS = (
    "seed", "privileged_context", "context_kwargs", "success_threshold", "chat_template_kwargs",
    "teacher_chat_template_kwargs", "teacher_generation_prefix", "max_teacher_prompt_length",
    "overlong_teacher_prompt", "teacher", "teacher_model_name_or_path", "teacher_model_init_kwargs", "divergence",
    "jsd_weight", "divergence_support", "divergence_top_k", "divergence_tail", "divergence_clip",
    "divergence_ratio_low", "divergence_ratio_high", "distillation_temperature", "num_generations", "temperature",
    "top_p", "top_k", "max_completion_length", "use_vllm", "vllm_mode", "per_device_eval_batch_size", "bf16", "fp16",
    "model_init_kwargs",
)  # fmt: skip
# Of rows of a stream, how many are read for each that is wanted
_OF_STREAM = 10


@help_from_docstring
@dataclass
class ProbeArguments:
    """
    Fields of `trl-opsd probe`, beside those of the training command.

    Args:
        method (`str`, *optional*):
            Training command that the recipe is for. By default what its folder, or else the file, is called.
        rows (`int`, *optional*, defaults to `200`):
            Number of held-out rows: of the test split if there is one, else drawn from the training rows, none of
            which has been trained on yet.
        samples (`int`, *optional*, defaults to `1`):
            Completions of each row by each side. A student whose rollouts the context reads writes at least
            `num_generations`.
        answer_column (`str`, *optional*):
            Column with the right answer. By default `answer`, or else the one with the solution.
        answer_type (`str`, *optional*, defaults to `"math"`):
            How answers are graded: `"math"`, `"choice"` or `"text"`, as in `trl-opsd eval`.
        probe_dir (`str`, *optional*):
            Folder of the probe. By default `probe` in `output_dir`. One that is there goes on where it stopped.
    """

    method: str | None = field(default=None, metadata={"choices": list(TRAINABLE)})
    rows: int = 200
    samples: int = 1
    answer_column: str | None = None
    answer_type: str = field(default="math", metadata={"choices": ["math", "choice", "text"]})
    probe_dir: str | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


def make_parser(method: str, prog: str | None = None) -> RecipeParser:
    """
    Makes the parser of the command.

    Args:
        method (`str`):
            Training command whose fields a recipe may have.
        prog (`str`, *optional*):
            Name of the program in help and errors.

    Returns:
        [`RecipeParser`]:
            Parser into `(ProbeArguments, SelfDistillationScriptArguments, configuration of the method, ModelConfig,
            DatasetMixtureConfig)`.
    """
    from trl import DatasetMixtureConfig, ModelConfig

    from trl_opsd.scripts.inputs import SelfDistillationScriptArguments
    from trl_opsd.trainer.checks.settings import RETIRED

    return RecipeParser(
        (ProbeArguments, SelfDistillationScriptArguments, config_class(method), ModelConfig, DatasetMixtureConfig),
        prog=prog,
        retired=RETIRED,
        usage="%(prog)s --config recipe.yaml [--rows 200] [--any_field value]",
        launch_hint="It has no meaning here: a probe runs in one process.",
        description="Measures, before any training, how much more the self-teacher of a recipe knows than its "
        "student, what of it needs the solution, and what the divergence is made of. Takes the recipe and the flags "
        "of the training command. A probe that was interrupted goes on where it stopped when it is started again.",
    )


def main(argv: Sequence[str], prog: str = "trl-opsd probe") -> int:
    """
    Runs the command.

    Args:
        argv (`Sequence[str]`):
            Arguments.
        prog (`str`, *optional*, defaults to `"trl-opsd probe"`):
            Name of the program in help and errors.

    Returns:
        `int`:
            Exit status: 0, 2 if something is wrong with the arguments, the data, the disk or the engine, 130 if
            interrupted.
    """
    kept = "All that was measured is kept: the same command goes on from here."
    try:
        method = method_of(argv)
        parsed = make_parser(method, prog).parse_args_and_config(argv)
        run(method, *parsed)
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # of the engine or the device
        message = shorten(f"{type(error).__name__}: {error}", 500, placeholder=" ...")
        print(f"{prog}: error: {message} {kept}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted. {kept}", file=sys.stderr)
        return 130
    return 0


def method_of(argv: Sequence[str]) -> str:
    """
    The training command that some flags are of.

    Args:
        argv (`Sequence[str]`):
            Arguments.

    Raises:
        ValueError: If they do not say.
    """
    given = {}
    for flag in ("--method", "--config"):
        for place, argument in enumerate(argv):
            if argument == flag and place + 1 < len(argv):
                given[flag] = argv[place + 1]
            elif argument.startswith(f"{flag}="):
                given[flag] = argument.partition("=")[2]
    if "--method" in given:
        return given["--method"]
    if {"-h", "--help"} & set(argv):
        return "distill"
    if "--config" in given:
        return method_of_recipe(given["--config"])
    raise ValueError(
        f"No recipe to probe: give `--config recipe.yaml`, or flags and `--method`, one of: {', '.join(TRAINABLE)}."
    )


def run(
    method: str,
    arguments: ProbeArguments,
    script_args: "SelfDistillationScriptArguments",
    training_args: "SelfDistillationConfig",
    model_args: "ModelConfig",
    dataset_args: "DatasetMixtureConfig",
) -> dict[str, Any]:
    """
    Probes, or finishes a probe that was interrupted. One that is interrupted says what the rows so far say.

    Args:
        method (`str`):
            Training command.
        arguments, script_args, training_args, model_args, dataset_args:
            What the parser gives.

    Returns:
        `dict[str, Any]`:
            What `probe.json` says.
    """
    from trl_opsd.context import make_context
    from trl_opsd.files import locked, take_up
    from trl_opsd.probe.measure import RECORDS, Measuring
    from trl_opsd.probe.readings import make_readings, solution_column
    from trl_opsd.probe.rows import MIN_ROWS, draw, reference_reader, summary_of

    _check(training_args, model_args)
    folder = Path(arguments.probe_dir or Path(str(training_args.output_dir)) / "probe")
    train, test, where = load_rows(arguments, script_args, dataset_args, training_args.eval_strategy != "no")
    context = make_context(
        training_args.privileged_context, cast("dict[str, Any] | None", training_args.context_kwargs)
    )
    answer_type: Any = arguments.answer_type
    column = solution_column(context)
    reference_of = reference_reader(test.column_names, arguments.answer_column, column, answer_type)
    questions, num_ungraded = draw(test, arguments.rows, training_args.seed, reference_of)
    passed_over = f"; {num_ungraded} were passed over, as the scorer cannot take their answer" if num_ungraded else ""
    print(said := f"{len(questions)} rows {where}{passed_over}.")
    trainer = _trainer(script_args, training_args, model_args, train, questions, folder)
    readings, missing = make_readings(trainer)
    chunk = 256 if training_args.use_vllm else training_args.per_device_eval_batch_size
    measuring = Measuring(trainer, questions, readings, answer_type, reference_of, arguments.samples, chunk)
    settings: dict[str, Any] = {"method": method, "model": model_args.model_name_or_path}
    settings |= {"revision": model_args.model_revision, "rows": summary_of(questions), "samples": arguments.samples}
    names = _SETTINGS + ("teachers", "teacher_column") * (training_args.teacher == "several")
    settings |= {name: getattr(training_args, name) for name in names} | {"answer_type": answer_type}
    arms = [reading.name for reading in readings]
    finishing = _Finishing(folder, questions, trainer, settings, said, missing | _absent(trainer), column, arms)
    with locked(folder):
        way_out = "Choose another `--probe_dir`, or delete that folder."
        take_up(folder / "settings.json", folder / RECORDS, settings, way_out)
        try:
            measuring.run(folder / RECORDS, shows_progress=not training_args.disable_tqdm)
        except KeyboardInterrupt:
            finishing(least=MIN_ROWS)
            raise
        return finishing()


def _check(training_args: "SelfDistillationConfig", model_args: "ModelConfig") -> None:
    from trl_opsd.trainer.several import has_served_teacher

    if model_args.model_name_or_path is None:
        raise ValueError("No model to probe: set `model_name_or_path` to a Hub id or a local folder.")
    if has_served_teacher(training_args):
        raise ValueError(
            "A teacher on a server (`teacher_server_base_url`) scores and does not write, and a probe has it answer. "
            "Leave the field out: before training, `teacher: live` and `initial` have the student's weights."
        )
    if training_args.max_completion_length is None:
        raise ValueError("A probe needs a limit of the answers: set `max_completion_length`.")
    if training_args.world_size > 1:
        raise ValueError("A probe runs in one process. Start it by `trl-opsd probe`, without `accelerate launch`.")
    for module, package in (("math_verify", "math-verify"), ("matplotlib", "matplotlib")):
        if find_spec(module) is None:
            raise ValueError(f"A probe needs {package}: pip install 'trl-opsd[eval]'.")


def load_rows(
    arguments: ProbeArguments,
    script_args: "SelfDistillationScriptArguments",
    dataset_args: "DatasetMixtureConfig",
    has_test_split: bool,
) -> "tuple[Dataset, Dataset, str]":
    """
    The training rows, and those to draw from.

    Args:
        arguments ([`ProbeArguments`]):
            How many.
        script_args ([`SelfDistillationScriptArguments`]):
            Data. Of a stream, the first rows are taken.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            Mixture of datasets.
        has_test_split (`bool`):
            Whether the recipe evaluates on a split of its own, which then has to be there.

    Returns:
        `tuple[Dataset, Dataset, str]`: both, and where the second come from.
    """
    from datasets import Dataset, IterableDataset

    from trl_opsd.scripts.inputs import load_datasets

    split = script_args.dataset_test_split
    try:
        train, test = load_datasets(script_args, dataset_args, with_eval=True)
        where = f"of the split `{split}`"
    except ValueError:
        if has_test_split or split != "test":
            raise
        train, test = load_datasets(script_args, dataset_args, with_eval=False)
        where = f"of the split `{script_args.dataset_train_split}`, on which nothing has been trained yet"
    test = train if test is None else test
    if isinstance(train, IterableDataset):
        number = _OF_STREAM * arguments.rows
        train, test = (Dataset.from_list(list(its.take(number))) for its in (train, test))
        where += f", from the first {number} of a stream"
    return cast(Dataset, train), cast(Dataset, test), where


def _trainer(
    script_args: "SelfDistillationScriptArguments",
    training_args: "SelfDistillationConfig",
    model_args: "ModelConfig",
    train: "Dataset",
    questions: "Sequence[Question]",
    folder: Path,
) -> "SelfDistillationTrainer":
    """The trainer of the recipe, which reports to nobody."""
    from datasets import Dataset

    from trl_opsd.scripts.inputs import load_reward_funcs
    from trl_opsd.scripts.train import make_trainer

    training_args.output_dir, training_args.report_to = str(folder), []
    training_args.push_to_hub, training_args.eval_strategy = False, cast(Any, "no")
    script_args.eval_benchmarks = None
    rows = Dataset.from_list([dict(question.row) for question in questions])
    return make_trainer(script_args, training_args, model_args, train, rows, load_reward_funcs(script_args))


def _absent(trainer: "SelfDistillationTrainer") -> dict[str, str]:
    """What a method lacks of what a probe measures."""
    from trl_opsd.probe.measure import scores_controls

    absent = {}
    if not trainer.signals.has_term("divergence_coef"):
        absent["divergence in the loss"] = (
            f"the method's loss has none; what is shown is {trainer.args.objective().description}, which the recipe "
            "would take"
        )
    if trainer.completion_source.replaces_rollouts:
        absent["completions that replace rollouts"] = "the divergence is measured on the student's own rollouts alone"
    if not scores_controls(trainer):
        absent["divergence under the controls"] = (
            f"the method pulls to {type(trainer.signals.target).__name__}, which is made of several readings"
        )
    return absent


@dataclass(frozen=True)
class _Finishing:
    """Sums up, prints and writes what has been measured."""

    folder: Path
    questions: "Sequence[Question]"
    trainer: "SelfDistillationTrainer"
    settings: Mapping[str, Any]
    rows: str
    missing: Mapping[str, str]
    column: str | None
    readings: Sequence[str]

    def __call__(self, least: int = 1) -> dict[str, Any]:
        """Of what is there, unless that is less than `least` rows."""
        from dataclasses import asdict

        from rich.console import Console

        from trl_opsd.files import write_whole
        from trl_opsd.probe.measure import RECORDS, STUDENT, read_records
        from trl_opsd.probe.page import make_page
        from trl_opsd.probe.summary import summarize
        from trl_opsd.probe.verdict import judge
        from trl_opsd.trainer.several import each_teacher

        def solution_of(row: int) -> str | None:
            return None if self.column is None else str(self.questions[row].row[self.column])

        records = read_records(self.folder / RECORDS)
        summary = summarize(records, [STUDENT, *self.readings], self.trainer.processing_class, solution_of)
        if summary["num_rows"] < least:
            return {}
        teachers = each_teacher(self.trainer.args).values()
        summary["is_external"] = any(its.teacher == "external" for its in teachers)
        verdict = judge(summary)
        measured = f"{summary['num_rows']} of {self.rows}"
        result = {"verdict": asdict(verdict), "rows": measured, **summary}
        result |= {"missing": dict(self.missing), "settings": json.loads(json.dumps(self.settings, default=str))}
        write_whole(self.folder / "probe.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
        write_whole(self.folder / "index.html", make_page(result, records, self.questions))
        _show(result, Console())
        print(f"Page: {self.folder / 'index.html'}. Figures: {self.folder / 'probe.json'}.")
        return result


def _show(result: Mapping[str, Any], console: Any) -> None:
    from rich.table import Table

    from trl_opsd.probe.page import ARM_HEADER, arm_rows
    from trl_opsd.probe.verdict import CONCLUSIONS

    shown = Table(title=result["rows"])
    for name in ARM_HEADER:
        shown.add_column(name, no_wrap=not name)
    for row in arm_rows(result, {}):
        shown.add_row(*row)
    console.print(shown)
    for name, why in result["missing"].items():
        console.print(f"Not there: {name}: {why}.", markup=False)
    console.print(f"[bold]{CONCLUSIONS[result['verdict']['conclusion']]}[/bold]")
    for sentence in result["verdict"]["sentences"]:
        console.print(sentence, markup=False)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
