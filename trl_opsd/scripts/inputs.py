"""What a training command trains on: rows with their prompts, and rewards."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

import yaml
from trl import DatasetMixtureConfig
from trl.scripts.grpo import GRPOScriptArguments

from trl_opsd.help import help_from_docstring
from trl_opsd.parts import import_object
from trl_opsd.scripts.benchmarks import BenchmarkArguments


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


logger = logging.getLogger(__name__)


@help_from_docstring
@dataclass
class PromptArguments:
    """
    Which rows, and how to make prompts of them.

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
        plain_prompts (`bool`, *optional*, defaults to `False`):
            Whether a prompt that is made from columns is plain text instead of a user message, for a model without a
            chat template.
    """

    dataset_name: str | None = None
    column_mapping: dict[str, str] | str | None = None
    prompt_template: str | None = None
    system_prompt: str | None = None
    plain_prompts: bool = False

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

    def with_prompts(self, rows: "Dataset | IterableDataset") -> "Dataset | IterableDataset":
        """Rows with their `prompt` column."""
        from trl_opsd.data import to_prompts

        return to_prompts(
            rows,
            column_mapping=cast(dict[str, str] | None, self.column_mapping),
            prompt_template=self.prompt_template,
            system_prompt=self.system_prompt,
            plain_prompts=self.plain_prompts,
        )


@help_from_docstring
@dataclass
class InspectArguments:
    """
    Fields of a training command for [`~trl_opsd.report.InspectCallback`].

    Args:
        inspect_steps (`int`, *optional*):
            Optimizer steps from one token page, `inspect/step-000050.html` in `output_dir`, to the next: a few of the
            step's rollouts, with what student and teacher say of every token. `None` writes none.
        inspect_rollouts (`int`, *optional*, defaults to `4`):
            Rollouts of a page.
    """

    inspect_steps: int | None = None
    inspect_rollouts: int = 4

    def __post_init__(self) -> None:
        for name in ("inspect_steps", "inspect_rollouts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")


@dataclass
class SelfDistillationScriptArguments(PromptArguments, BenchmarkArguments, InspectArguments, GRPOScriptArguments):
    """Arguments of a training command: TRL's GRPO script's, how to make prompts, benchmarks, and token pages."""

    def __post_init__(self) -> None:
        PromptArguments.__post_init__(self)
        BenchmarkArguments.__post_init__(self)
        InspectArguments.__post_init__(self)


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

    from trl_opsd.data import load_rows

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
    train, *rest = (script_args.with_prompts(dataset) for dataset in rows)
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
    model = script_args.reward_model_name_or_path
    return [*([model] if model else []), *find_reward_funcs(script_args.reward_funcs)]


def find_reward_funcs(names: str | Sequence[str] | None) -> list[Callable[..., Any]]:
    """
    Find reward functions.

    Args:
        names (`str` or `Sequence[str]`, *optional*):
            Names of rewards in `trl.rewards`, or dotted import paths. A recipe may give a single one.

    Returns:
        `list[Callable]`:
            The functions. Those of TRL, which read messages, also read the completions of plain prompts.

    Raises:
        ValueError: If there is no such function.
    """
    from trl import rewards

    found: list[Callable[..., Any]] = []
    known = {name: getattr(rewards, name) for name in dir(rewards) if name.endswith("_reward")}
    for name in [names] if isinstance(names, str) else names or []:
        if name == "get_soft_overlong_punishment":
            # The values TRL's GRPO script uses.
            found.append(rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256))
            continue
        if name in known:
            found.append(_of_text_too(known[name]))
            continue
        try:
            found.append(import_object(name))
        except ImportError as error:
            raise ValueError(
                f"Cannot load the reward function {name!r}: {error}. Give the import path of a function, or one of "
                f"{', '.join([*known, 'get_soft_overlong_punishment'])}."
            ) from error
    return found


def _of_text_too(reward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(reward)
    def rewarded(completions: Sequence[Any], **kwargs: Any) -> Any:
        messages = [[{"role": "assistant", "content": its}] if isinstance(its, str) else its for its in completions]
        return reward(completions=messages, **kwargs)

    return rewarded
