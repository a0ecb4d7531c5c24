"""The fields of an evaluation. Nothing heavy is imported here, so that `--help` answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from ..help import help_from_docstring
from ..sampling import Sampling
from ..sampling.arguments import EngineArguments, as_mapping


PRESETS: dict[str, dict[str, Any]] = {
    # https://huggingface.co/papers/2601.18734
    "opsd": {
        "num_samples": 12,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": 38_912,
        "chat_template_kwargs": {"enable_thinking": True},
    },
    # https://huggingface.co/papers/2603.05433
    "opsdc": {
        "num_samples": 8,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "max_new_tokens": 30_000,
        "chat_template_kwargs": {"enable_thinking": True},
    },
}


@help_from_docstring
@dataclass
class EvalArguments(EngineArguments):
    """
    Fields of `trl-opsd eval`, beside those of the model and the backend.

    Args:
        > Parameters that control the problems

        benchmarks (`list[str]`, *optional*):
            Names of benchmarks (`--list` shows them), or YAML files that describe one.
        dataset_name (`str`, *optional*):
            Your own problems instead: Hub id, local json, jsonl, csv or parquet file, folder of such files, or folder
            written by `save_to_disk`.
        dataset_config (`str`, *optional*):
            Name of that dataset's configuration.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split of that dataset. A single file is the split `"train"`.
        question_column (`str`, *optional*, defaults to `"question"`):
            Column of that dataset with the questions.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column of that dataset with the right answers.
        answer_type (`str`, *optional*, defaults to `"math"`):
            How answers to that dataset are graded: `"math"`, `"choice"` or `"text"`.
        prompt_template (`str`, *optional*):
            Jinja template of the user turn for that dataset, which sees `question` and `row`. By default it asks for
            the final answer in `\\boxed{}`.
        limit (`int`, *optional*):
            Number of problems of each benchmark, from the beginning. All by default.

        > Parameters that control generation

        preset (`str`, *optional*, defaults to `"opsd"`):
            Published setting that the fields below default to: `"opsd"` (12 samples, temperature 1, 38,912 tokens,
            thinking) or `"opsdc"` (8 samples, temperature 0.6, top-p 0.95, top-k 20, 30,000 tokens, thinking).
        num_samples (`int`, *optional*):
            Completions of each problem. By default the preset's.
        temperature (`float`, *optional*):
            Sampling temperature. 0 always takes the likeliest token. By default the preset's.
        top_p (`float`, *optional*):
            Probability that the likeliest tokens to sample from must reach together. 1 samples from all. By default
            the preset's.
        top_k (`int`, *optional*):
            Number of likeliest tokens to sample from. 0 samples from all. By default the preset's.
        max_new_tokens (`int`, *optional*):
            Longest completion in tokens. By default the preset's.
        seed (`int`, *optional*, defaults to `0`):
            Seed that those of all completions come from.

        > Parameters that control the prompt

        chat_template_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments of the chat template, e.g. `{"enable_thinking": false}`. Instead of the preset's.
        chat_template_path (`str`, *optional*):
            Jinja file with a chat template to use instead of the tokenizer's.
        apply_chat_template (`bool`, *optional*, defaults to `True`):
            Whether to ask through the chat template. Without it, the model continues the bare prompt.
        system_prompt (`str`, *optional*):
            System message before each question.

        > Parameters that control the results

        output_dir (`str`, *optional*):
            Folder of the run. A run that is there already goes on where it stopped. Defaults to `eval/` and the last
            parts of the model's and the adapter's names.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to delete an earlier run in that folder.
    """

    benchmarks: list[str] | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    question_column: str = "question"
    answer_column: str = "answer"
    answer_type: Literal["math", "choice", "text"] = "math"
    prompt_template: str | None = None
    limit: int | None = None

    preset: Literal["opsd", "opsdc"] = "opsd"
    num_samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0

    chat_template_kwargs: dict[str, Any] | str | None = None
    chat_template_path: str | None = None
    apply_chat_template: bool = True
    system_prompt: str | None = None

    output_dir: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.benchmarks, str):  # as a file may name a single one
            self.benchmarks = [self.benchmarks]
        if not all(isinstance(benchmark, str) for benchmark in self.benchmarks or []):
            raise ValueError(f"`benchmarks` must be names or files, got {self.benchmarks!r}.")
        super().__post_init__()
        self.chat_template_kwargs = as_mapping("chat_template_kwargs", self.chat_template_kwargs)
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if (not self.benchmarks) == (self.dataset_name is None):
            raise ValueError(
                "Name the problems: either `benchmarks` (`trl-opsd eval --list` shows them) or `dataset_name`."
            )
        self._check_numbers()
        if self.output_dir is None:
            parts = [str(self.model_name_or_path), *([self.adapter] if self.adapter else [])]
            self.output_dir = f"eval/{'-'.join(Path(part).name for part in parts)}"

    def sampling(self) -> Sampling:
        """How to draw tokens."""
        return Sampling(
            temperature=cast(float, self.temperature),
            top_p=cast(float, self.top_p),
            top_k=cast(int, self.top_k),
            max_new_tokens=cast(int, self.max_new_tokens),
        )

    def _check_numbers(self) -> None:
        self.sampling()
        for name in ("num_samples", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.temperature == 0 and cast(int, self.num_samples) > 1:
            raise ValueError(
                f"With `temperature` 0 all {self.num_samples} completions of a problem would be the same. Set "
                "`num_samples` to 1, or raise the temperature."
            )
