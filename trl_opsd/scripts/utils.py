import difflib
import logging
import os
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import yaml
from trl import DatasetMixtureConfig, ModelConfig, TrlParser
from trl.scripts.grpo import GRPOScriptArguments

from trl_opsd.help import help_from_docstring
from trl_opsd.parts import import_object
from trl_opsd.scripts.benchmarks import BenchmarkArguments, callback_values
from trl_opsd.scripts.recipe_values import field_types, read_recipe, recipe_value


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer


logger = logging.getLogger(__name__)


@help_from_docstring
@dataclass
class SelfDistillationScriptArguments(BenchmarkArguments, GRPOScriptArguments):
    """
    Script arguments of a training command: those of TRL's GRPO script, how to make prompts, and benchmarks.

    Args:
        dataset_name (`str`, *optional*):
            Dataset id on the Hub, or a local json, jsonl, csv or parquet file, a folder of such files, or a folder
            written by `save_to_disk`. If `datasets` is given, this is ignored.
        column_mapping (`dict[str, str]` or `str`, *optional*):
            New dataset columns, as source column to new name, e.g. `{"question": "prompt", "reference": "solution"}`.
            On the command line, JSON or a YAML mapping. Without it, a dataset that lacks a `prompt` column takes it
            from `problem`, `question`, `query` or `instruction`.
        prompt_template (`str`, *optional*):
            Format string that makes the user message from any columns, e.g. `"{problem}\\nAnswer in {language}."`.
            Literal braces are written doubled.
        system_prompt (`str`, *optional*):
            System message put before each conversational prompt.
    """

    dataset_name: str | None = None
    column_mapping: dict[str, str] | str | None = None
    prompt_template: str | None = None
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        mapping: Any = self.column_mapping
        if isinstance(mapping, str):
            with suppress(yaml.YAMLError):
                mapping = yaml.safe_load(mapping)
        if mapping is not None and not (
            isinstance(mapping, dict) and all(isinstance(name, str) for pair in mapping.items() for name in pair)
        ):
            raise ValueError(
                'Expected `column_mapping` to map column names to column names, as in {"question": "prompt"}, got '
                f"{mapping!r}."
            )
        self.column_mapping = mapping
        super().__post_init__()


class RecipeParser(TrlParser):
    """
    [`~trl.TrlParser`] that refuses the keys and flags it does not know, and names the known one that comes closest.

    Args:
        dataclass_types (`Iterable[type]`, *optional*):
            Dataclasses to parse into.
        launch_hint (`str`, *optional*):
            What to do with a flag of `accelerate launch`. By default for commands that are launched.
        retired (`Mapping[str, str]`, *optional*):
            What took the place of fields that are gone, by their names.
        **kwargs:
            Keyword arguments of [`~argparse.ArgumentParser`].
    """

    def __init__(
        self,
        dataclass_types: Any = None,
        launch_hint: str = "Give it on the command line of `trl-opsd`, or to `accelerate launch` before `-m`.",
        retired: Mapping[str, str] | None = None,
        **kwargs: Any,
    ):
        # Abbreviations would let a misspelt flag through, and take launch flags for ours.
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self._launch_hint = launch_hint
        self._retired = retired or {}
        self._field_types = field_types(self.dataclass_types)
        for action in self._actions:
            if f"--no_{action.dest}" in action.option_strings:
                action.help = f"Sets `{action.dest}` to false."
                action.default = SUPPRESS  # the default is that of the flag it negates

    def error(self, message: str) -> NoReturn:
        # Argparse would print the usage first, some two hundred flags.
        print(f"{self.prog}: error: {message} (`--help` explains every field)", file=sys.stderr)
        raise SystemExit(2)

    def split_args(self, args: Sequence[str]) -> tuple[list[str], list[str]]:
        """
        Tell the arguments of the script from all others.

        Args:
            args (`Sequence[str]`):
                Command line.

        Returns:
            `tuple[list[str], list[str]]`:
                The flags this parser knows (`--config` included) with their values, and the remaining arguments.
        """
        ours: list[str] = []
        others: list[str] = []
        current = others
        for arg in args:
            flag, is_assigned, value = arg.partition("=")
            if flag == "--config":
                current = ours
                current.extend([flag, value] if is_assigned else [flag])
                continue
            if re.match(r"--?[A-Za-z]", arg):
                current = ours if flag in self._option_string_actions else others
            current.append(arg)
        if ours[-1:] == ["--config"]:
            raise ValueError("`--config` needs the path of a recipe file.")
        return ours, others

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        ours, others = self.split_args(list(sys.argv[1:] if args is None else args))
        if others:
            raise ValueError(self.explain_unknown(others[0]))
        if "--config" in ours:
            position = ours.index("--config")
            values = read_recipe(ours[position + 1])
            del ours[position : position + 2]
            os.environ.update({name: str(value) for name, value in values.pop("env", {}).items()})
            self.set_defaults_with_config(**values)
        return super().parse_args_and_config(
            ours, return_remaining_strings, fail_with_unknown_args, separate_remaining_strings
        )

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        known = [action.dest for action in self._actions]
        for key, value in kwargs.items():
            if key not in known:
                raise ValueError(self.explain_unknown(key))
            # YAML reads a bare `no` as false.
            if key.endswith("_strategy") and value is False:
                kwargs[key] = "no"
            kwargs[key] = recipe_value(key, kwargs[key], self._field_types.get(key, Any))
        return super().set_defaults_with_config(**kwargs)

    def explain_unknown(self, name: str) -> str:
        """
        Say what may have been meant by an unknown flag or key.

        Args:
            name (`str`):
                Flag (`--learning_rat`), key of a recipe file (`learning_rat`), or stray value.

        Returns:
            `str`:
                Error message.
        """
        from accelerate.commands.launch import launch_command_parser

        is_flag = name.startswith("-")
        name = name.partition("=")[0] if is_flag else name
        key = name.lstrip("-").replace("-", "_")
        what = f"the flag `{name}`" if is_flag else f"`{name}`"
        if key in self._retired:
            return f"Unknown field: {what} is none any more: {self._retired[key]}."
        launch_fields = {action.dest for action in launch_command_parser()._actions} | {"accelerate_config"}
        if key in launch_fields:
            return f"Unknown field: {what} belongs to `accelerate launch`. {self._launch_hint}"
        if not is_flag and Path(name).suffix in (".yaml", ".yml"):
            return f"Unknown field: {what}. Did you mean `--config {name}`?"
        fields = [action.dest for action in self._actions]
        close = difflib.get_close_matches(key, [*fields, *(launch_fields if is_flag else [])], n=1)
        hint = f"Did you mean `{'--' * is_flag}{close[0]}`?" if close else "`--help` lists every field."
        return f"Unknown field: {what}. {hint}"


def says_how_to_resume(command: Callable[..., None]) -> Callable[..., None]:
    """Make Ctrl-C end a training command in words, with status 130."""

    @wraps(command)
    def interruptible(*args: Any) -> None:
        try:
            command(*args)
        except KeyboardInterrupt:
            (training_args,) = (argument for argument in args if hasattr(argument, "output_dir"))
            if training_args.process_index == 0:
                print(
                    "Interrupted. `--resume_from_checkpoint auto` goes on from the last checkpoint in "
                    f"{training_args.output_dir}, if there is one.",
                    file=sys.stderr,
                )
            raise SystemExit(130) from None

    return interruptible


@says_how_to_resume
def run(
    script_args: SelfDistillationScriptArguments,
    training_args: "SelfDistillationConfig",
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """
    Train, save and, if asked to, push a model.

    Args:
        script_args ([`SelfDistillationScriptArguments`]):
            Data and rewards.
        training_args ([`SelfDistillationConfig`]):
            Arguments of the trainer. `resume_from_checkpoint` may also be `"true"`, the newest checkpoint in
            `output_dir`, or `"auto"`, the same if there is one.
        model_args ([`~trl.ModelConfig`]):
            Model, LoRA and quantization.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            Mixture of datasets, instead of `script_args.dataset_name`.
    """
    import transformers
    from packaging.version import Version

    from trl_opsd.report import PromptPreviewCallback

    if model_args.model_name_or_path is None:
        raise ValueError("No model to train: set `model_name_or_path` to a Hub id or a local folder.")
    if training_args.process_index > 0:
        logging.getLogger("trl_opsd").setLevel(logging.ERROR)
    checkpoint = find_checkpoint(training_args.resume_from_checkpoint, str(training_args.output_dir))

    # The main process fills the cache of `datasets`, the others read it.
    with training_args.main_process_first(desc="loading the dataset"):
        train_dataset, eval_dataset = load_datasets(
            script_args, dataset_args, with_eval=training_args.eval_strategy != "no"
        )
    trainer = make_trainer(
        script_args,
        training_args,
        model_args,
        train_dataset,
        eval_dataset,
        load_reward_funcs(script_args),
    )
    trainer.add_callback(PromptPreviewCallback(trainer))

    if checkpoint is not None:
        trainer.accelerator.print(f"Resuming from {checkpoint}.")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.accelerator.print("✅ Training completed.")

    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")

    if training_args.push_to_hub:
        # A model card can only name a dataset of the Hub.
        name = script_args.dataset_name
        trainer.push_to_hub(dataset_name=None if name is None or Path(name).expanduser().exists() else name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")

    if Version(transformers.__version__) >= Version("5.18.0"):
        trainer.end()


def make_trainer(
    script_args: SelfDistillationScriptArguments,
    training_args: "SelfDistillationConfig",
    model_args: ModelConfig,
    train_dataset: "Dataset | IterableDataset",
    eval_dataset: "Dataset | IterableDataset | None" = None,
    reward_funcs: Any = None,
) -> "SelfDistillationTrainer":
    """
    Make the trainer that a recipe describes, on rows that have been loaded.

    Args:
        script_args ([`SelfDistillationScriptArguments`]):
            Its system prompt is also that of benchmarks which have none of their own.
        training_args ([`SelfDistillationConfig`]):
            Arguments of the trainer. `model_init_kwargs` is completed with what `model_args` says, and wins over it.
        model_args ([`~trl.ModelConfig`]):
            Model, LoRA and quantization.
        train_dataset (`Dataset` or `IterableDataset`):
            Rows to train on.
        eval_dataset (`Dataset` or `IterableDataset`, *optional*):
            Rows to evaluate on.
        reward_funcs (*optional*):
            Reward functions, as the trainer takes them.

    Returns:
        [`SelfDistillationTrainer`]:
            The trainer.
    """
    from trl import get_peft_config, get_quantization_config

    from trl_opsd import SelfDistillationTrainer

    model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    model_init_kwargs.update(cast(dict[str, Any], training_args.model_init_kwargs or {}))
    training_args.model_init_kwargs = model_init_kwargs
    benchmarks = callback_values(script_args, training_args, script_args.system_prompt)
    trainer = SelfDistillationTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if benchmarks is not None:
        from trl_opsd.eval.in_training import BenchmarkCallback

        trainer.add_callback(BenchmarkCallback(trainer, **benchmarks))
    return trainer


def load_datasets(
    script_args: SelfDistillationScriptArguments, dataset_args: DatasetMixtureConfig, *, with_eval: bool
) -> tuple["Dataset | IterableDataset", "Dataset | IterableDataset | None"]:
    """
    Load the rows to train on, and those to evaluate on, with their `prompt` column.

    Args:
        script_args ([`SelfDistillationScriptArguments`]):
            Dataset, splits, and how to make prompts.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            Mixture of datasets, which takes precedence over `script_args.dataset_name`.
        with_eval (`bool`):
            Whether to load the evaluation split.

    Returns:
        `tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]`:
            Rows for training, and for evaluation.
    """
    from trl import get_dataset

    from trl_opsd.data import load_rows, to_prompts

    splits = [script_args.dataset_train_split, *([script_args.dataset_test_split] if with_eval else [])]
    if dataset_args.datasets:
        if script_args.dataset_name:
            logger.warning("Both `datasets` and `dataset_name` are set: `datasets` is used, `dataset_name` is not.")
        mixture = get_dataset(dataset_args)
        if missing := [split for split in splits if split not in mixture]:
            raise ValueError(
                f"The mixture of `datasets` has no split {missing[0]!r}, only: {', '.join(mixture)}. Set "
                "`test_split_size` to split off rows for evaluation."
            )
        rows = [mixture[split] for split in splits]
    elif script_args.dataset_name:
        rows = [
            load_rows(
                script_args.dataset_name,
                config=script_args.dataset_config,
                split=split,
                streaming=script_args.dataset_streaming,
            )
            for split in splits
        ]
    else:
        raise ValueError(
            "No data to train on: set `dataset_name` to a Hub id or a local file or folder, or `datasets`."
        )
    train, *rest = (
        to_prompts(
            dataset,
            column_mapping=cast(dict[str, str] | None, script_args.column_mapping),
            prompt_template=script_args.prompt_template,
            system_prompt=script_args.system_prompt,
        )
        for dataset in rows
    )
    return train, rest[0] if rest else None


def load_reward_funcs(script_args: GRPOScriptArguments) -> list[str | Callable[..., Any]]:
    """
    Find the reward functions that are given by name.

    Args:
        script_args ([`~trl.scripts.grpo.GRPOScriptArguments`]):
            Names: of a reward in `trl.rewards`, a dotted import path, or a reward model.

    Returns:
        `list`:
            The reward functions, and the name of the reward model.
    """
    from trl import rewards

    found: list[str | Callable[..., Any]] = []
    if script_args.reward_model_name_or_path:
        found.append(script_args.reward_model_name_or_path)
    names = {name: getattr(rewards, name) for name in dir(rewards) if name.endswith("_reward")}
    given: Any = script_args.reward_funcs or []
    # A recipe may name a single one without making it a list.
    for name in [given] if isinstance(given, str) else given:
        if name == "get_soft_overlong_punishment":
            # The values TRL's GRPO script uses.
            found.append(rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256))
            continue
        if name in names:
            found.append(names[name])
            continue
        try:
            found.append(import_object(name))
        except ImportError as error:
            raise ValueError(
                f"Cannot load the reward function {name!r}: {error}. Give the import path of a function, or one of "
                f"{', '.join([*names, 'get_soft_overlong_punishment'])}."
            ) from error
    return found


def find_checkpoint(resume: str | bool | None, output_dir: str) -> str | None:
    """
    Find the checkpoint that `resume_from_checkpoint` asks for.

    Args:
        resume (`str` or `bool`, *optional*):
            Folder of a checkpoint, `"true"` for the newest in `output_dir`, or `"auto"` for the same if there is one.
        output_dir (`str`):
            Folder a run saves its checkpoints in.

    Returns:
        `str`, *optional*:
            Folder of the checkpoint, `None` to start from the beginning.
    """
    from trl_opsd.trainer.checkpoints import newest_complete, read_state

    choice = str(resume).lower()
    if choice in ("none", "false", "no"):
        return None
    if choice in ("true", "auto"):
        newest = newest_complete(output_dir)
        if newest is None and choice == "true":
            raise ValueError(
                f"`resume_from_checkpoint` is true, but {output_dir} has no complete checkpoint. Name one, or use "
                "`auto` to start from the beginning where there is none."
            )
        return newest
    read_state(Path(str(resume)))
    return str(resume)
