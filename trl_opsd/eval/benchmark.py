"""Benchmarks: where the problems come from, how they are asked and how they are graded."""

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..help import listed
from .scorer import AnswerType


_PROMPT = "{{ question }}\n\nReason step by step and give your final answer in \\boxed{}."
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FOLDER = Path(str(files("trl_opsd.eval"))) / "benchmarks"


@dataclass(frozen=True)
class Problem:
    """
    One question of a benchmark.

    Args:
        benchmark (`str`):
            Name of the benchmark.
        problem_id (`str`):
            Identifies the problem within the benchmark, the same in every run.
        prompt (`str`):
            What the model is asked: the content of the user turn.
        reference (`str`):
            Right answer. With choices, its letter.
        answer_type (`str`, *optional*, defaults to `"math"`):
            How answers are graded: `"math"`, `"choice"` or `"text"`.
        level (`str`, *optional*):
            Difficulty or subject.
    """

    benchmark: str
    problem_id: str
    prompt: str
    reference: str
    answer_type: AnswerType = "math"
    level: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """
    A set of problems with right answers, as the files in `trl_opsd/eval/benchmarks` describe them.

    Args:
        name (`str`):
            Name of the benchmark, and of its folder among the results.
        dataset_name (`str`):
            Dataset id on the Hub, or a local file or folder that [`~trl_opsd.data.load_rows`] reads. In a YAML file,
            also a file or folder beside it.
        dataset_config (`str`, *optional*):
            Name of the dataset's configuration.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split with the problems.
        dataset_revision (`str`, *optional*):
            Branch, tag or commit of a dataset on the Hub.
        question_column (`str`, *optional*, defaults to `"question"`):
            Column with the question: a string, or one user message.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column with the right answer.
        wrong_choice_columns (`list[str]`, *optional*):
            Columns with the wrong choices of a multiple-choice question whose right choice is in `answer_column`. The
            choices are shuffled by a seed of the problem's own, the same in every run.
        id_column (`str`, *optional*):
            Column with a value of its own in each row. Without it, a problem is identified by a hash of its question.
        level_column (`str`, *optional*):
            Column with the difficulty or subject.
        prompt_template (`str`, *optional*):
            Jinja template of the user turn. It sees `question`, `choices` (a dictionary of letters and texts) and
            `row`. By default it asks for the final answer in `\\boxed{}`.
        answer_type (`str`, *optional*, defaults to `"math"`):
            How answers are graded: `"math"`, `"choice"` or `"text"`.
        licence (`str`, *optional*, defaults to `"not stated"`):
            Licence of the data.
        description (`str`, *optional*, defaults to `""`):
            What it is, in one line.

    Raises:
        ValueError: If a field is not text, if the name is none for a folder, or if the template is malformed or never
            shows the question.
    """

    name: str
    dataset_name: str
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_revision: str | None = None
    question_column: str = "question"
    answer_column: str = "answer"
    wrong_choice_columns: tuple[str, ...] = ()
    id_column: str | None = None
    level_column: str | None = None
    prompt_template: str = _PROMPT
    answer_type: AnswerType = "math"
    licence: str = "not stated"
    description: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "wrong_choice_columns":
                if not isinstance(value, list | tuple) or not all(isinstance(column, str) for column in value):
                    raise ValueError(
                        f"Benchmark {self.name}: `{field.name}` must be a list of columns, got {value!r}."
                    )
            elif not isinstance(value, str) and (value is not None or field.default is not None):
                raise ValueError(
                    f"Benchmark {self.name}: `{field.name}` must be text, got {value!r}. Put it in quotes."
                )
        # Runs are found by <run>/<name>/samples.jsonl
        if self.name in ("", "..") or Path(self.name).name != self.name:
            raise ValueError(f"`name` is {self.name!r}, which cannot be a folder of its own. Choose a plain name.")
        object.__setattr__(self, "wrong_choice_columns", tuple(self.wrong_choice_columns))
        if self.answer_type not in ("math", "choice", "text"):
            raise ValueError(
                f"Benchmark {self.name}: `answer_type` is {self.answer_type!r}. Choose math, choice or text."
            )
        if self.wrong_choice_columns and self.answer_type != "choice":
            raise ValueError(f"Benchmark {self.name}: with `wrong_choice_columns`, `answer_type` must be choice.")
        self._template()

    def problems(self, limit: int | None = None) -> list[Problem]:
        """
        Loads the problems.

        Args:
            limit (`int`, *optional*):
                Number of problems from the beginning. `None` loads all.

        Returns:
            `list[Problem]`:
                Problems in the order of the dataset.

        Raises:
            ValueError: For missing columns, empty questions or answers, and ids that are not unique.
        """
        rows = self._rows()
        columns = [self.question_column, self.answer_column, *self.wrong_choice_columns]
        columns += [column for column in (self.id_column, self.level_column) if column is not None]
        if missing := [column for column in columns if column not in rows.column_names]:
            raise ValueError(
                f"Benchmark {self.name}: {self.dataset_name} has no column {listed(missing)}; its columns are "
                f"{listed(rows.column_names)}. Name the right ones (`question_column`, `answer_column`, ...)."
            )
        template = self._template()
        problems: dict[str, Problem] = {}
        for index, row in enumerate(rows.select(range(min(limit or len(rows), len(rows))))):
            try:
                problem = self._problem(row, template, problems)
            except (ValueError, TemplateError) as error:
                raise ValueError(f"Benchmark {self.name}, row {index} of {self.dataset_name}: {error}") from None
            problems[problem.problem_id] = problem
        return list(problems.values())

    def _rows(self) -> Any:
        from trl_opsd.data import load_rows

        return load_rows(
            self.dataset_name,
            config=self.dataset_config,
            split=self.dataset_split,
            revision=self.dataset_revision,
        )

    def _template(self) -> Template:
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        try:
            template = environment.from_string(self.prompt_template)
        except TemplateError as error:
            raise ValueError(f"Benchmark {self.name}: `prompt_template` is malformed: {error}") from error
        if "question" not in self.prompt_template and "row" not in self.prompt_template:
            raise ValueError(
                f"Benchmark {self.name}: `prompt_template` never shows the question. Add {{{{ question }}}}."
            )
        return template

    def _problem(self, row: Mapping[str, Any], template: Template, earlier: Mapping[str, Problem]) -> Problem:
        question = _question(row[self.question_column], self.question_column)
        reference = _text(row[self.answer_column], self.answer_column)
        if self.id_column is not None:
            problem_id = _text(row[self.id_column], self.id_column)
            if problem_id in earlier:
                raise ValueError(f"the column `{self.id_column}` has {problem_id!r} a second time. Name another one.")
        else:
            first = problem_id = hashlib.sha256(question.encode()).hexdigest()[:16]
            occurrences = 1
            while problem_id in earlier:
                occurrences += 1
                problem_id = f"{first}-{occurrences}"
        choices: dict[str, str] = {}
        if self.wrong_choice_columns:
            texts = [reference, *(_text(row[column], column) for column in self.wrong_choice_columns)]
            order = random.Random(f"choices of {problem_id}").sample(range(len(texts)), len(texts))
            choices = {_LETTERS[place]: texts[index] for place, index in enumerate(order)}
            reference = _LETTERS[order.index(0)]
        prompt = template.render(question=question, choices=choices, row=row)
        level = None if self.level_column is None else row[self.level_column]
        return Problem(
            self.name, problem_id, prompt, reference, self.answer_type, None if level is None else str(level)
        )


def benchmark_names() -> list[str]:
    """Names of the benchmarks that come with the package."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def load_benchmark(name_or_path: str) -> Benchmark:
    """
    Reads the description of a benchmark. Its problems are not loaded.

    Args:
        name_or_path (`str`):
            Name of a benchmark that comes with the package, or path of a YAML file with the fields of [`Benchmark`].
            Without `name`, the benchmark is called like its file.

    Returns:
        [`Benchmark`]:
            The benchmark.

    Raises:
        ValueError: For an unknown name, and for a file that is no description of a benchmark.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        if name_or_path not in benchmark_names():
            raise ValueError(
                f"There is no benchmark {name_or_path!r}. Name one of {', '.join(benchmark_names())}, or a YAML file "
                "that describes one, or your own data with `dataset_name`, `question_column` and `answer_column`."
            )
        path = _FOLDER / f"{name_or_path}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"Cannot read the benchmark {path}: {error}") from error
    known = [field.name for field in fields(Benchmark)]
    if not isinstance(content, dict) or "dataset_name" not in content:
        raise ValueError(f"{path} describes no benchmark: it has no `dataset_name`. Its fields are {listed(known)}.")
    if unknown := [key for key in content if key not in known]:
        raise ValueError(f"{path} has the unknown field {listed(unknown)}. The fields are {listed(known)}.")
    beside = path.parent / str(content["dataset_name"])
    if beside.exists():
        content["dataset_name"] = str(beside)
    return Benchmark(**{"name": path.stem, **content})


def _question(value: Any, column: str) -> str:
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "user":
            raise ValueError(f"`{column}` must be a string or one user message, and has other messages.")
        value = value[0]["content"]
    return _text(value, column)


def _text(value: Any, column: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, float) and math.isnan(value):
        value = None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"`{column}` holds {'nothing' if value is None else type(value).__name__} instead of text.")
    text = str(value).strip()
    if not text:
        raise ValueError(f"`{column}` is empty. Correct the row, or remove it.")
    return text
