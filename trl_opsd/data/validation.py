import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset

from ..help import listed
from .images import image_columns, image_problem, undecoded


_BATCH_SIZE = 1000
_BATCH_SIZE_OF_IMAGES = 16


def validate_rows(
    dataset: Dataset | IterableDataset,
    columns: Sequence[str],
    *,
    name: str = "train_dataset",
    structured: Sequence[str] = (),
    reads_images: bool = False,
    choices: Mapping[str, Sequence[str]] | None = None,
) -> Dataset | IterableDataset:
    """
    Refuse a dataset that cannot be trained on, before anything is put on a device.

    Every row needs a prompt that a model can answer (a non-empty string, or messages of text with a user turn that do
    not end in an assistant turn) and a value in each privileged column: text, or what is written as itself, such as a
    number.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset to check.
        columns (`Sequence[str]`):
            Privileged columns, besides `prompt`.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            What error messages call the dataset.
        structured (`Sequence[str]`, *optional*):
            Privileged columns whose reader knows what to do with lists and mappings.
        reads_images (`bool`, *optional*, defaults to `False`):
            Whether the model reads images: prompts may then have places for them, and each row needs as many.
        choices (`Mapping[str, Sequence[str]]`, *optional*):
            What may be in some of the columns.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]:
            The same dataset, all of it checked; or, for a stream, one that had its first row checked and checks the
            others as they are read.

    Raises:
        `ValueError`: naming the missing column, or the row and column at fault.

    Example:
    ```python
    >>> from datasets import Dataset
    >>> from trl_opsd.data import validate_rows

    >>> validate_rows(Dataset.from_dict({"prompt": ["2 + 2?"], "solution": [" "]}), ["solution"])
    ValueError: train_dataset, row 0: `solution` is empty. ...
    ```
    """
    required = list(dict.fromkeys(["prompt", *columns]))
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name} is empty: it has no rows.")
    if missing := [column for column in required if column not in first]:
        raise ValueError(
            f"{name} has no column {listed(missing)}; its columns are {listed(first)}. Rename a column with "
            "`column_mapping` (or `dataset.rename_column`), or choose what reads it in another way "
            "(`privileged_context`, `completions`, `teacher_column`)."
        )

    images = image_columns(dataset) if reads_images else []

    def check(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        for column in required:
            find_problem = _structured_problem if column in structured else _text_problem
            if column == "prompt":
                find_problem = partial(_prompt_problem, reads_images=reads_images)
            for index, value in zip(indices, rows[column], strict=True):
                if problem := find_problem(value) or _choice_problem(value, (choices or {}).get(column)):
                    raise _refusal(name, index, f"`{column}` {problem}")
        for position, index in enumerate(indices if reads_images else []):
            if problem := image_problem({column: rows[column][position] for column in ("prompt", *images)}):
                raise _refusal(name, index, problem)
        return rows

    if isinstance(dataset, IterableDataset):
        checked = dataset.map(check, with_indices=True, batched=True, batch_size=1, features=dataset.features)
        next(iter(checked))
        return checked

    # A `set_transform` may make values on the fly; any other format (torch, numpy, ...) only changes their type.
    plain = dataset
    if dataset.format["type"] != "custom":
        plain = undecoded(dataset.with_format(None).select_columns([*required, *images]))
    start = 0
    for rows in plain.iter(_BATCH_SIZE_OF_IMAGES if images else _BATCH_SIZE):
        indices = list(range(start, start + len(rows["prompt"])))
        check(rows, indices)
        start += len(indices)
    return dataset


def _refusal(name: str, index: int, problem: str) -> ValueError:
    return ValueError(f"{name}, row {index}: {problem}. Correct the row, or remove it with `dataset.filter`.")


def _problem(value: Any) -> str | None:
    if value is None:
        return "is null"
    if isinstance(value, float) and math.isnan(value):
        return "is NaN, which is how pandas writes a missing value"
    if isinstance(value, str | list | dict) and not (value.strip() if isinstance(value, str) else value):
        return "is empty"
    return None


def _structured_problem(value: Any) -> str | None:
    if isinstance(value, list) and value and all(isinstance(its, dict) and "content" in its for its in value):
        texts = [_text(message["content"]) for message in value]
        if not any(text is None or text.strip() for text in texts):
            return "has messages without text"
    return _problem(value)


def _text_problem(value: Any) -> str | None:
    if problem := _problem(value):
        return problem
    if isinstance(value, Iterable) and not isinstance(value, str):
        return (
            f"is of type {type(value).__name__}, and the teacher would read Python's notation of it. Put the text it "
            "is to read into a column, or write a `privileged_context` of your own, which may read anything"
        )
    return None


def _choice_problem(value: Any, choices: Sequence[str] | None) -> str | None:
    if choices is None or value in choices:
        return None
    return f"is {value!r}, and none of {listed(choices)}"


def _prompt_problem(value: Any, reads_images: bool) -> str | None:
    if problem := _problem(value):
        return problem
    if isinstance(value, str):
        return None
    if not isinstance(value, list):
        return f"is of type {type(value).__name__}, neither a string nor a list of messages"
    has_user_turn = False
    for position, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            return f"has a message, number {position}, that is not a dictionary with `role` and `content`"
        content, has_image = _without_images(message["content"]) if reads_images else (message["content"], False)
        text = _text(content)
        if text is None and not (message["role"] == "assistant" and message.get("tool_calls")):
            return f"has a message, number {position}, whose content is neither a string nor a list of text parts"
        if message["role"] == "user":
            has_user_turn = True
            if not has_image and (not text or not text.strip()):
                return f"has a user turn, message number {position}, that is empty"
    if not has_user_turn:
        return "has no user turn"
    if value[-1]["role"] == "assistant":
        return "ends in an assistant turn, so there is nothing left to answer"
    return None


def _without_images(content: Any) -> tuple[Any, bool]:
    if not isinstance(content, list):
        return content, False
    others = [part for part in content if not isinstance(part, dict) or part.get("type") != "image"]
    return others, len(others) < len(content)


def _text(content: Any) -> str | None:
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    return content if isinstance(content, str) else None
