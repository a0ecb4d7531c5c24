"""`trl-opsd generate`: make a data set that `trl sft` or `trl dpo` reads, of rows that a model completes."""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, cast

from trl_opsd.help import did_you_mean, help_from_docstring
from trl_opsd.sampling import Sampling
from trl_opsd.sampling.arguments import EngineArguments, as_mapping
from trl_opsd.scripts.inputs import PromptArguments, find_reward_funcs
from trl_opsd.scripts.recipe import RecipeParser


if TYPE_CHECKING:
    from trl_opsd.context import PrivilegedContext
    from trl_opsd.generate import Maker, Writer
    from trl_opsd.generate.sampler import Sampler
    from trl_opsd.sampling import Backend

# Fields that completions do not depend on: the data set is what the last command asks for
_NOT_SETTINGS = {"maker_kwargs", "reward_funcs", "success_threshold", "limit", "output_dir", "teacher"}
_TEMPLATE = "chat_template_kwargs"


@help_from_docstring
@dataclass
class GenerateArguments(EngineArguments, PromptArguments):
    """
    Fields of `trl-opsd generate`, beside those of the model, the backend and the prompts.

    Args:
        maker_kwargs (`dict[str, Any]` or `str`, *optional*):
            Arguments of the maker, e.g. `{num_samples: 8, keep: correct}` of `rollouts`.
        teacher (`dict[str, Any]` or `str`, *optional*):
            A second model, for a maker that takes one: fields of the model and the backend, of those of this command,
            and its own `chat_template_kwargs`, e.g. `{model_name_or_path: openai/gpt-oss-120b, backend: vllm_server}`.
        dataset_name (`str`, *optional*):
            Dataset id on the Hub, or a local json, jsonl, csv or parquet file, a folder of such files, or a folder
            written by `save_to_disk`.
        dataset_config (`str`, *optional*):
            Name of the dataset's configuration.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to complete. A single file is the split `"train"`.
        limit (`int`, *optional*):
            Number of rows, from the beginning. All by default.
        privileged_context (`str`, *optional*):
            What a maker that gives hints shows beyond the prompt, as in training: `"answer"`, `"solution"`, another
            context that neither reads rollouts nor samples, or the import path of your own class.
        context_kwargs (`dict[str, Any]` or `str`, *optional*):
            Arguments of the context.
        reward_funcs (`list[str]`, *optional*):
            Reward functions, which tell right from wrong: names of rewards in `trl.rewards`, or import paths. The
            reward of a completion is their sum.
        success_threshold (`float`, *optional*, defaults to `1.0`):
            Reward from which on a completion is correct.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature. 0 always takes the likeliest token.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability that the likeliest tokens to sample from must reach together. 1 samples from all.
        top_k (`int`, *optional*, defaults to `0`):
            Number of likeliest tokens to sample from. 0 samples from all.
        max_new_tokens (`int`, *optional*, defaults to `4096`):
            Longest completion in tokens.
        seed (`int`, *optional*, defaults to `0`):
            Seed that those of all completions come from.
        chat_template_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments of the chat template, e.g. `{"enable_thinking": false}`. They become a column of the data
            set, from which TRL's SFT trainer takes them.
        output_dir (`str`, *optional*):
            Folder of the run. A run that is there already goes on where it stopped.
    """

    maker_kwargs: dict[str, Any] | str | None = None
    teacher: dict[str, Any] | str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    limit: int | None = None
    privileged_context: str | None = None
    context_kwargs: dict[str, Any] | str | None = None
    reward_funcs: list[str] | None = None
    success_threshold: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 4096
    seed: int = 0
    chat_template_kwargs: dict[str, Any] | str | None = None
    output_dir: str | None = None

    def __post_init__(self) -> None:
        EngineArguments.__post_init__(self)
        PromptArguments.__post_init__(self)
        for name in ("maker_kwargs", "teacher", "context_kwargs", "chat_template_kwargs"):
            setattr(self, name, as_mapping(name, getattr(self, name)))
        for name, what in (("dataset_name", "rows to complete"), ("output_dir", "folder to write to")):
            if getattr(self, name) is None:
                raise ValueError(f"No {what}: set `{name}`.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` must be at least 1, got {self.limit}.")
        if self.context_kwargs is not None and self.privileged_context is None:
            raise ValueError(f"`context_kwargs={self.context_kwargs!r}` has no effect without `privileged_context`.")
        self.sampling()
        self.second_model()

    def sampling(self) -> Sampling:
        """How to draw tokens."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.max_new_tokens)

    def second_model(self) -> EngineArguments | None:
        """
        Fields of the second model, if there is one.

        Raises:
            ValueError: If there is no such field, or a value is wrong.
        """
        if self.teacher is None:
            return None
        given = {name: value for name, value in cast("dict[str, Any]", self.teacher).items() if name != _TEMPLATE}
        known = [field.name for field in fields(EngineArguments)]
        for name in given:
            if name not in known:
                raise ValueError(f"`teacher` has no field `{name}`. {did_you_mean(name, [*known, _TEMPLATE])}")
        try:
            as_mapping(_TEMPLATE, cast("dict[str, Any]", self.teacher).get(_TEMPLATE))
            return EngineArguments(**given)
        except ValueError as error:
            raise ValueError(f"Of `teacher`: {error}") from error


def make_parser(prog: str | None = None) -> RecipeParser:
    """
    Makes the parser of the command, but for the name of the maker.

    Args:
        prog (`str`, *optional*):
            Name of the program in help and errors.

    Returns:
        [`RecipeParser`]:
            Parser into [`GenerateArguments`].
    """
    from trl_opsd.generate import MAKERS

    return RecipeParser(
        [GenerateArguments],
        prog=prog,
        usage="%(prog)s maker --config recipe.yaml [--any_field value]",
        launch_hint="It has no meaning here: transformers runs in one process, and vLLM takes several GPUs with "
        "`--model_init_kwargs '{tensor_parallel_size: 8}'`.",
        description=f"Makes a data set that `trl sft` or `trl dpo` reads. The maker is one of {', '.join(MAKERS)}, or "
        "the import path of your own. A run that was interrupted goes on where it stopped when it is started again "
        "with the same fields. A recipe file has any of the fields below as keys; flags take precedence over it.",
    )


def main(argv: Sequence[str], prog: str = "trl-opsd generate") -> int:
    """
    Runs the command.

    Args:
        argv (`Sequence[str]`):
            Arguments.
        prog (`str`, *optional*, defaults to `"trl-opsd generate"`):
            Name of the program in help and errors.

    Returns:
        `int`:
            Exit status: 0, 2 if something is wrong with the arguments, the data, the disk or the engine, 130 if
            interrupted.
    """
    kept = "All finished completions are kept: the same command goes on from here"
    parser = make_parser(prog)
    try:
        if not argv or (argv[0].startswith("-") and not {"-h", "--help"} & set(argv)):
            raise ValueError("Name the maker before all flags, e.g. `trl-opsd generate star --config recipe.yaml`.")
        name, flags = (argv[0], argv[1:]) if not argv[0].startswith("-") else ("", argv)
        (arguments,) = parser.parse_args_and_config(flags)
        run(name, arguments)
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # of the engine, the device or an adapter
        message = shorten(f"{type(error).__name__}: {error}", 500, placeholder=" ...")
        print(
            f"{prog}: error: {message} {kept}, also with another `batch_size` or `gpu_memory_utilization`.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted. {kept}.", file=sys.stderr)
        return 130
    return 0


def run(name: str, arguments: GenerateArguments) -> dict[str, Any]:
    """
    Makes a data set, or finishes one that was interrupted.

    Args:
        name (`str`):
            Name of the maker, or its import path.
        arguments ([`GenerateArguments`]):
            Fields of the command.

    Returns:
        `dict[str, Any]`:
            What `summary.json` says.
    """
    from trl_opsd.files import locked, take_up
    from trl_opsd.generate import Problems, make_maker
    from trl_opsd.generate.folder import COMPLETIONS, TEACHER_COMPLETIONS
    from trl_opsd.generate.rewards import Rewards
    from trl_opsd.trainer.rewards import decoded

    maker = make_maker(name, cast("dict[str, Any] | None", arguments.maker_kwargs))
    functions = find_reward_funcs(arguments.reward_funcs)
    if maker.needs_rewards and not functions:
        raise ValueError(f"The maker {name} has to tell right from wrong. Set `reward_funcs`.")
    context = _make_context(name, maker, arguments)
    rows = _load_rows(arguments, context)
    grade = Rewards(functions, rows, arguments.success_threshold, arguments.batch_size)
    template_kwargs = cast("dict[str, Any] | None", arguments.chat_template_kwargs)
    student = _Model(arguments, template_kwargs, rows, context, arguments)
    second = arguments.second_model()
    teacher_kwargs = cast("dict[str, Any]", arguments.teacher or {}).get(_TEMPLATE, template_kwargs)
    teacher = (
        None if second is None else _Model(second, as_mapping(_TEMPLATE, teacher_kwargs), rows, context, arguments)
    )

    def decode(row: int, prompt: list[int], completion: list[int]) -> Any:
        return decoded(student.tokenizer, rows[row]["prompt"], [prompt], [completion])[0]

    folder = Path(str(arguments.output_dir))
    own = {field.name for field in fields(GenerateArguments)} - {field.name for field in fields(EngineArguments)}
    values = asdict(arguments)
    settings = {"maker": name} | {field: values[field] for field in values if field in own - _NOT_SETTINGS}
    settings |= student.settings()
    if teacher is not None:
        settings["teacher"] = teacher.settings() | {_TEMPLATE: teacher_kwargs}
    others = {field: values[field] for field in values if field not in settings or field == "model_init_kwargs"}
    with locked(folder), ExitStack() as stack:
        way_out = "Choose another `output_dir`, or delete that folder."
        take_up(folder / "run.json", folder / COMPLETIONS, settings, way_out, other_fields=others)
        sampler = student.sampler(folder / COMPLETIONS, decode, stack)
        writers = {"student": student.writer(student.prompt_ids, sampler)}
        if teacher is not None:
            asked = teacher.prompt_ids if context is None else teacher.hinted_prompt_ids
            theirs = teacher.sampler(folder / TEACHER_COMPLETIONS, lambda row, prompt, completion: None, stack)
            writers["teacher"] = teacher.writer(asked, theirs)
        elif context is not None:
            writers["teacher"] = student.writer(student.hinted_prompt_ids, sampler)
        made = maker(
            Problems(
                rows=rows,
                prompt_ids=student.prompt_ids,
                hinted_prompt_ids=student.hinted_prompt_ids,
                sample=sampler,
                grade=grade,
                mix=sampler.mix,
                sampling=arguments.sampling(),
                decode=lambda row, ids: decode(row, student.prompt_ids[row], ids),
                writers=writers,
                has_second_model=teacher is not None,
            )
        )
        return _finish(folder, len(rows), made.records, made.dropped, arguments)


class _Model:
    """A model of the run: its tokenizer, what it reads of the rows, and what samples from it."""

    def __init__(
        self,
        engine: EngineArguments,
        template_kwargs: dict[str, Any] | None,
        rows: Sequence[Mapping[str, Any]],
        context: "PrivilegedContext | None",
        arguments: GenerateArguments,
    ):
        self._engine, self._arguments = engine, arguments
        self.tokenizer = engine.load_tokenizer()
        name = str(arguments.dataset_name)
        self.prompt_ids, self.hinted_prompt_ids = _rendered(rows, self.tokenizer, context, name, template_kwargs or {})
        self._served = engine.load_backend(self.tokenizer) if engine.backend == "vllm_server" else None

    def settings(self) -> dict[str, Any]:
        return self._engine.engine_settings(getattr(self._served, "root", None))

    def sampler(self, file: Path, decode: Callable[[int, list[int], list[int]], Any], stack: ExitStack) -> "Sampler":
        from trl_opsd.generate.sampler import Sampler

        sampling, seed = self._arguments.sampling(), self._arguments.seed
        return stack.enter_context(closing(Sampler(file, self._load, decode, sampling, seed)))

    def writer(self, prompt_ids: Sequence[list[int] | None], sampler: "Sampler") -> "Writer":
        from trl_opsd.generate import Writer

        return Writer(prompt_ids, self.tokenizer, sampler)

    def _load(self) -> "Backend":
        backend = self._served or self._engine.load_backend(self.tokenizer)
        for kind, prompts in (
            ("prompt", self.prompt_ids),
            ("prompt with the privileged context", self.hinted_prompt_ids),
        ):
            _check_lengths(kind, prompts, backend.max_length, self._arguments.max_new_tokens)
        return backend


def _make_context(name: str, maker: "Maker", arguments: GenerateArguments) -> "PrivilegedContext | None":
    from trl_opsd.context import NoContext, SampledContext, make_context

    given, takes_teacher = arguments.privileged_context, getattr(maker, "takes_teacher", False)
    if arguments.teacher is not None and not takes_teacher:
        raise ValueError(f"`teacher` has no effect with the maker {name}, which has one model. Leave it out.")
    if takes_teacher and given is None:
        if arguments.teacher is None:
            raise ValueError(
                f"The maker {name} has two writers. Set `teacher` to a second model, such as {{model_name_or_path: "
                "...}, or `privileged_context` for the same model reading more."
            )
        return None
    if not maker.needs_context and not takes_teacher:
        if given is not None:
            raise ValueError(f"`privileged_context={given!r}` has no effect with the maker {name}. Leave it out.")
        return None
    if given is None:
        raise ValueError(f"The maker {name} shows the model a hint. Set `privileged_context`, for example to answer.")
    context = make_context(given, cast("dict[str, Any] | None", arguments.context_kwargs))
    if isinstance(context, NoContext):
        raise ValueError(f"The maker {name} shows the model a hint, and `privileged_context={given!r}` is none.")
    if isinstance(context, SampledContext) or getattr(context, "reads_rollouts", True):
        raise ValueError(
            f"The maker {name} shows the model a hint before there are rollouts, and `privileged_context={given!r}` "
            "reads them, or samples. Choose a context that does neither."
        )
    return context


def _load_rows(arguments: GenerateArguments, context: "PrivilegedContext | None") -> Any:
    from trl_opsd.context import TextContext
    from trl_opsd.data import load_rows, validate_rows
    from trl_opsd.trainer.checks.parts import check_context

    name, split = str(arguments.dataset_name), arguments.dataset_train_split
    dataset = arguments.with_prompts(load_rows(name, config=arguments.dataset_config, split=split))
    columns = () if context is None else tuple(context.columns)
    validate_rows(dataset, columns, name=name, structured=() if isinstance(context, TextContext) else columns)
    if context is not None:
        has_rewards = bool(arguments.reward_funcs)
        check_context(context, 1, dataset, has_rewards=has_rewards, has_feedback=has_rewards)
    return list(dataset if arguments.limit is None else dataset.take(min(arguments.limit, len(dataset))))


def _rendered(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    context: "PrivilegedContext | None",
    name: str,
    kwargs: dict[str, Any],
) -> tuple[list[list[int]], list[list[int] | None]]:
    """Token ids of the bare prompts, and of those with the context."""
    from tqdm.auto import tqdm

    from trl_opsd.context import NoContext, TeacherPrompt

    if not isinstance(rows[0]["prompt"], str) and tokenizer.chat_template is None:
        raise ValueError(
            f"{name} has conversational prompts, but the tokenizer has no chat template. Take "
            "another `tokenizer`, or rows with plain prompts."
        )
    prompts = [
        None if one is None else TeacherPrompt(one, tokenizer, kwargs, "", max_length=None, skip_overlong=False)
        for one in (NoContext(), context)
    ]
    bare: list[list[int]] = []
    hinted: list[list[int] | None] = []
    for index, row in enumerate(tqdm(rows, "rendering prompts", leave=False)):
        try:
            ids, hinted_ids = (None if prompt is None else prompt.token_ids(row, None) for prompt in prompts)
        except ValueError as error:
            raise ValueError(f"Row {index} of {name}: {error}") from error
        bare.append(cast("list[int]", ids))
        hinted.append(hinted_ids)
    return bare, hinted


def _check_lengths(
    kind: str, prompts: Sequence[list[int] | None], max_length: int | None, max_new_tokens: int
) -> None:
    for row, ids in enumerate(prompts):
        if ids is not None and max_length is not None and len(ids) + max_new_tokens > max_length:
            left = max_length - len(ids)
            advice = f"Lower `max_new_tokens` to at most {left}" if left > 0 else "Leave the row out"
            raise ValueError(
                f"The {kind} of row {row} has {len(ids)} tokens. With `max_new_tokens` = {max_new_tokens} that is "
                f"more than the {max_length} of the model. {advice}."
            )


def _finish(
    folder: Path, num_rows: int, records: list[dict[str, Any]], dropped: Counter[str], arguments: GenerateArguments
) -> dict[str, Any]:
    from trl_opsd.files import write_whole
    from trl_opsd.generate.folder import write_dataset

    sources = Counter(record.get("source", "record") for record in records)
    summary = {"rows": num_rows, "kept": dict(sources), "dropped": dict(dropped)}
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    told = ", ".join(f"{number:,} {reason}" for reason, number in dropped.most_common()) or "none"
    if not records:
        shutil.rmtree(folder / "data", ignore_errors=True)
        raise ValueError(f"Nothing of {num_rows:,} rows is worth keeping ({told}), so that there is no data set.")
    same: dict[str, Any] = {"model": _name_of(arguments)}
    if (second := arguments.second_model()) is not None:
        same["teacher_model"] = _name_of(second)
    for record in records:
        if arguments.chat_template_kwargs and not isinstance(record["prompt"], str):
            same["chat_template_kwargs"] = arguments.chat_template_kwargs
        record.update(same)
    where = write_dataset(folder, records)
    kept = ", ".join(f"{number:,} {source}" for source, number in sources.most_common())
    print(f"{len(records):,} records of {num_rows:,} rows ({kept}; left out: {told}).")
    print(f"They are in {where}, for the field `dataset_name` of TRL's commands.")
    return summary


def _name_of(engine: EngineArguments) -> str:
    return str(engine.model_name_or_path) + (f" with {engine.adapter}" if engine.adapter else "")
