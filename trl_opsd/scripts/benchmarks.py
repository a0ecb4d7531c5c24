"""Benchmarks while training, as fields of the training commands."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from trl_opsd.help import help_from_docstring


if TYPE_CHECKING:
    from trl_opsd import SelfDistillationConfig


@help_from_docstring
@dataclass
class BenchmarkArguments:
    """
    Fields of a training command for [`~trl_opsd.eval.in_training.BenchmarkCallback`].

    Args:
        eval_benchmarks (`list[str]`, *optional*):
            Benchmarks to evaluate on before training, every `eval_benchmarks_steps` steps and at the end: names that
            `trl-opsd eval --list` shows, or YAML files. It is the evaluation of `trl-opsd eval`, on the engine of the
            rollouts.
        eval_benchmarks_steps (`int`, *optional*, defaults to `50`):
            Optimizer steps between two evaluations.
        eval_benchmarks_num_samples (`int`, *optional*, defaults to `1`):
            Completions of each problem.
        eval_benchmarks_limit (`int`, *optional*):
            Number of problems of each benchmark, from its beginning. `None` takes all.
        eval_benchmarks_sampling (`dict[str, Any]` or `str`, *optional*):
            How the completions are sampled, for example `{"temperature": 0.6, "top_p": 0.95, "top_k": 20,
            "max_new_tokens": 4096}`. What it leaves out is as in the rollouts.
        eval_benchmarks_system_prompt (`str`, *optional*):
            System message before each question. By default `system_prompt`.
    """

    eval_benchmarks: list[str] | None = None
    eval_benchmarks_steps: int = 50
    eval_benchmarks_num_samples: int = 1
    eval_benchmarks_limit: int | None = None
    eval_benchmarks_sampling: dict[str, Any] | str | None = None
    eval_benchmarks_system_prompt: str | None = None

    def __post_init__(self) -> None:
        sampling: Any = self.eval_benchmarks_sampling
        if isinstance(sampling, str):
            with suppress(yaml.YAMLError):
                sampling = yaml.safe_load(sampling)
        if sampling is not None and not isinstance(sampling, dict):
            raise ValueError(
                "Expected `eval_benchmarks_sampling` to be a mapping, as in {temperature: 0.6}, got "
                f"{self.eval_benchmarks_sampling!r}."
            )
        self.eval_benchmarks_sampling = sampling
        for name in ("eval_benchmarks_steps", "eval_benchmarks_num_samples", "eval_benchmarks_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name in ("eval_benchmarks_limit", "eval_benchmarks_sampling", "eval_benchmarks_system_prompt"):
            if self.eval_benchmarks is None and getattr(self, name) is not None:
                raise ValueError(f"`{name}={getattr(self, name)!r}` has no effect without `eval_benchmarks`.")


def callback_values(
    arguments: BenchmarkArguments, training_args: "SelfDistillationConfig", system_prompt: str | None
) -> dict[str, Any] | None:
    """
    Load benchmarks, so that what is wrong with them is found before a model is loaded.

    Args:
        arguments ([`BenchmarkArguments`]):
            Fields of a training command.
        training_args ([`SelfDistillationConfig`]):
            Arguments of the trainer.
        system_prompt (`str`, *optional*):
            System message where `arguments` have none.

    Returns:
        `dict[str, Any]`, *optional*:
            Keyword arguments of [`~trl_opsd.eval.in_training.BenchmarkCallback`], `None` without benchmarks.

    Raises:
        ValueError: Naming `eval_benchmarks`, if there is something wrong with them.
    """
    if arguments.eval_benchmarks is None:
        return None
    from trl_opsd.eval.in_training import load_problems, make_sampling

    sampling: Any = arguments.eval_benchmarks_sampling
    own_prompt = arguments.eval_benchmarks_system_prompt
    try:
        make_sampling(sampling, arguments.eval_benchmarks_num_samples, training_args)
        problems: Mapping[str, Any] = load_problems(arguments.eval_benchmarks, arguments.eval_benchmarks_limit)
    except ValueError as error:
        raise ValueError(f"`eval_benchmarks`: {error}") from error
    return {
        "benchmarks": problems,
        "steps": arguments.eval_benchmarks_steps,
        "num_samples": arguments.eval_benchmarks_num_samples,
        "sampling": sampling,
        "system_prompt": system_prompt if own_prompt is None else own_prompt,
    }
