import logging
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value

from ..help import listed
from .template import Template


logger = logging.getLogger(__name__)

_PROMPT_COLUMNS = ("problem", "question", "query", "instruction")


def to_prompts(
    dataset: Dataset | IterableDataset,
    *,
    column_mapping: dict[str, str] | None = None,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
    plain_prompts: bool = False,
) -> Dataset | IterableDataset:
    """
    Give a dataset the `prompt` column that the trainers read, and any other column under the name they expect.

    A prompt made from another column, or by `prompt_template`, is a user message, or plain text if asked for. A
    `prompt` column that the dataset already has stays exactly as it is: a string is a plain prompt, a list of messages
    a conversational one. All columns are kept.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset to convert.
        column_mapping (`dict[str, str]`, *optional*):
            New columns, as source column to new name, e.g. `{"question": "prompt", "reference": "solution"}`. Without
            it, a dataset that lacks `prompt` takes it from its `problem`, `question`, `query` or `instruction` column.
        prompt_template (`str`, *optional*):
            Format string that makes the user message from any columns, e.g. `"{prompt}\\nAnswer in {language}."`.
            Write literal braces doubled: `\\boxed{{}}`.
        system_prompt (`str`, *optional*):
            System message put before each conversational prompt.
        plain_prompts (`bool`, *optional*, defaults to `False`):
            Whether a prompt that is made is plain text instead of a user message, for a model without a chat template.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]:
            The dataset with its `prompt` column.

    Example:
    ```python
    >>> from datasets import Dataset
    >>> from trl_opsd.data import to_prompts

    >>> dataset = Dataset.from_dict({"question": ["2 + 2?"], "solution": ["2 + 2 = 4"]})
    >>> to_prompts(dataset)[0]["prompt"]
    [{'role': 'user', 'content': '2 + 2?'}]
    ```
    """
    # A stream may learn what its columns are only from its first row.
    columns = dataset.column_names or list(next(iter(dataset), {}))
    mapping = {target: source for source, target in (column_mapping or {}).items() if source != target}
    _check_mapping(column_mapping or {}, columns)

    template = None if prompt_template is None else Template(prompt_template, "`prompt_template`")
    placeholders = set() if template is None else set(template.names)
    needs_prompt = template is None or "prompt" in placeholders
    if needs_prompt and "prompt" not in mapping and "prompt" not in columns:
        mapping["prompt"] = _find_prompt_column(columns)
    available = list(dict.fromkeys([*columns, *mapping]))
    if unknown := sorted(placeholders.difference(available)):
        raise ValueError(
            f"`prompt_template` uses the placeholder {{{unknown[0]}}}, but the dataset has only the columns "
            f"{listed(available)}. Correct the name, or write literal braces doubled: {{{{ and }}}}."
        )
    if plain_prompts:
        _check_plain(system_prompt, makes_prompt=template is not None or "prompt" in mapping)
    if not mapping and template is None and system_prompt is None:
        return dataset

    def as_prompt(text: str) -> Any:
        return text if plain_prompts else [{"role": "user", "content": text}]

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        new = {target: row[source] for target, source in mapping.items()}
        row = {**row, **new}
        if template is not None:
            prompt = as_prompt(template.fill(row, f"row {index}"))
        elif "prompt" in mapping and isinstance(row["prompt"], str):
            prompt = as_prompt(row["prompt"])
        elif plain_prompts and row["prompt"] is not None:
            raise ValueError(f"`plain_prompts` needs text, but the `prompt` of row {index} is a conversation.")
        else:
            prompt = row["prompt"]
        if system_prompt is not None and prompt is not None:
            prompt = _with_system_prompt(system_prompt, prompt, index)
        return {**new, "prompt": prompt}

    features = _features(dataset, mapping, template is not None, plain_prompts)
    return dataset.map(convert, with_indices=True, features=features)


def _check_plain(system_prompt: str | None, makes_prompt: bool) -> None:
    if system_prompt is not None:
        raise ValueError(
            "`system_prompt` needs conversational prompts, and `plain_prompts` makes plain ones. Put its text into "
            "`prompt_template`, or leave one of them out."
        )
    if not makes_prompt:
        raise ValueError(
            "`plain_prompts` has no effect on a `prompt` column that the dataset already has. Make the prompt with "
            "`prompt_template`, or leave it out."
        )


def _check_mapping(column_mapping: dict[str, str], columns: list[str]) -> None:
    if missing := [source for source in column_mapping if source not in columns]:
        raise ValueError(
            f"`column_mapping` maps the column `{missing[0]}`, but the dataset has only the columns {listed(columns)}."
        )
    targets = list(column_mapping.values())
    for source, target in column_mapping.items():
        if targets.count(target) > 1:
            raise ValueError(f"`column_mapping` maps more than one column to `{target}`; keep one of them.")
        if target in columns and target not in column_mapping:
            raise ValueError(
                f"`column_mapping` maps `{source}` to `{target}`, but the dataset already has a column `{target}`. "
                f"To replace it, map that one to another name too, e.g. {target}: original_{target}."
            )


def _find_prompt_column(columns: list[str]) -> str:
    found = [column for column in _PROMPT_COLUMNS if column in columns]
    way_out = "Name the one to use with `column_mapping`, e.g. {question: prompt}, or write a `prompt_template`."
    if not found:
        raise ValueError(
            f"The dataset has no `prompt` column, nor {listed(_PROMPT_COLUMNS)}; its columns are {listed(columns)}. "
            f"{way_out}"
        )
    if len(found) > 1:
        raise ValueError(
            f"The dataset has no `prompt` column and more than one that could stand in for it: {listed(found)}. "
            f"{way_out}"
        )
    logger.warning(f"The dataset has no `prompt` column, its `{found[0]}` column becomes the prompt.")
    return found[0]


def _with_system_prompt(system_prompt: str, prompt: Any, index: int) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        raise ValueError(
            f"`system_prompt` needs conversational prompts, but the `prompt` of row {index} is a plain string. Add "
            '`prompt_template="{prompt}"` to make it a user message.'
        )
    if prompt and prompt[0].get("role") == "system":
        raise ValueError(f"`system_prompt` is set, but the `prompt` of row {index} already has a system message.")
    return [{"role": "system", "content": system_prompt}, *prompt]


def _features(
    dataset: Dataset | IterableDataset, mapping: dict[str, str], templated: bool, plain: bool
) -> Features | None:
    # Without them, `map` would guess the types of the new columns from their first rows.
    if dataset.features is None:
        return None
    features = dataset.features.copy()
    features.update({target: dataset.features[source] for target, source in mapping.items()})
    if templated or ("prompt" in mapping and features["prompt"] in (Value("string"), Value("large_string"))):
        text = Value("string")
        features["prompt"] = text if plain else List({"role": text, "content": text})
    return features
