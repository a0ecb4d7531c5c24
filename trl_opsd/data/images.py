"""Images of rows: the columns that hold them, and prompts with them in their places."""

from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset, Image, List
from trl.data_utils import prepare_multimodal_messages


IMAGE_COLUMNS = ("images", "image")
"""Those that student and teacher read, as in GRPOTrainer: of both, it reads the first."""
TEACHER_IMAGES = "teacher_images"
"""The one that only the teacher reads."""
_BATCH_SIZE = 1000


def image_columns(dataset: Any) -> list[str]:
    """
    The columns of a dataset that hold images.

    Args:
        dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Dataset.
    """
    if dataset is None:
        return []
    if isinstance(dataset, dict):
        return list(dict.fromkeys(name for some in dataset.values() for name in image_columns(some)))
    columns = dataset.column_names or list(next(iter(dataset), {}))
    return [name for name in (*IMAGE_COLUMNS, TEACHER_IMAGES) if name in columns]


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """The images of a row's prompt, none if there is no column of them."""
    if "images" in row:
        return list(row["images"] or [])
    return [row["image"]] if row.get("image") is not None else []


def teacher_images_of(row: Mapping[str, Any]) -> list[Any]:
    """The images of a row that only the teacher reads."""
    value = row.get(TEACHER_IMAGES)
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def prompt_of(row: Mapping[str, Any]) -> Any:
    """
    The prompt of a row as GRPOTrainer makes it: messages have the images of the row in their places, or before the
    text of the first user turn if they have none.

    Raises:
        ValueError: If there are more places or fewer.
    """
    prompt, images = row["prompt"], images_of(row)
    if isinstance(prompt, str) or not images or any("image" in part for part in image_parts(prompt)):
        return prompt
    return prepare_multimodal_messages(prompt, images=images)


def image_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of messages that are images, or places for them."""
    contents = (message.get("content") for message in messages)
    return [
        part for content in contents if isinstance(content, list) for part in content if part.get("type") == "image"
    ]


def prompts_of(dataset: Dataset) -> Iterator[list[Any]]:
    """The prompts of a dataset with their images, some at a time."""
    has_images = any(name in dataset.column_names for name in IMAGE_COLUMNS)
    for rows in dataset.iter(16 if has_images else _BATCH_SIZE):
        if not has_images:
            yield rows["prompt"]
            continue
        yield [prompt_of(dict(zip(rows, values, strict=True))) for values in zip(*rows.values(), strict=True)]


def image_problem(row: Mapping[str, Any]) -> str | None:
    """
    What is wrong with the images of a row.

    Args:
        row (`Mapping[str, Any]`):
            Row with a valid prompt, and its columns of images.
    """
    for name in (*IMAGE_COLUMNS[: 1 if "images" in row else 2], TEACHER_IMAGES):
        values = row.get(name, [])
        if values is None or (isinstance(values, list) and None in values):
            empty = "" if name == "image" else ". A row without any has an empty list"
            return f"`{name}` is null, so it is without its image{empty}"
    images, prompt = images_of(row), row["prompt"]
    if isinstance(prompt, str):
        has_any = images or teacher_images_of(row)
        return (
            "`prompt` is plain text, and has images. Make it messages, so that they have a place" if has_any else None
        )
    parts = image_parts(prompt)
    places = [part for part in parts if "image" not in part]
    if not places and not any(isinstance(its["content"], str) for its in prompt if its["role"] == "user"):
        return f"`prompt` has no place for its {len(images)} images" if images else None
    if places and len(places) != len(images):
        return f"`prompt` has {len(places)} places for images, and the row has {len(images)}"
    return None


def undecoded(dataset: Dataset) -> Dataset:
    """A dataset whose images are not decoded."""
    for name in image_columns(dataset):
        feature = dataset.features[name]
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset
