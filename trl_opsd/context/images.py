"""Images in prompts that contexts read and write as text: taken out, and put back in their places."""

import re
from typing import Any

from ..data import image_parts
from .base import Message, as_text, last_user_turn


_PLACE = "\ufdd0image {}\ufdd1"  # no character of any text
_PLACES = re.compile("\ufdd0image (\\d+)\ufdd1")


def without_images(messages: list[Message]) -> list[Message]:
    """Messages of text, with a mark where each image is."""
    number = 0
    marked = []
    for message in messages:
        parts = message.get("content")
        if isinstance(parts, list):
            texts = []
            for part in parts:
                if part.get("type") == "image":
                    texts.append({"text": _PLACE.format(number)})
                    number += 1
                else:
                    texts.append(part)
            message = {**message, "content": texts}
        marked.append(message)
    return as_text(marked)


def with_images(
    messages: list[Message], prompt: list[Message], teacher_images: list[Any], context: str
) -> list[Message]:
    """
    Messages that a context made of text, in parts, with the images of the prompt where their marks are. If the context
    left all of them out, they come before the text of the last user turn. Those of the teacher's own follow the last
    image of that turn.

    Args:
        messages (`list[dict[str, Any]]`):
            What the context returned.
        prompt (`list[dict[str, Any]]`):
            The row's prompt, with its images.
        teacher_images (`list[Any]`):
            Images that the teacher reads besides.
        context (`str`):
            Name of the context, for the message.

    Raises:
        ValueError: If the context kept some images of the prompt, or changed their order.
    """
    images = [part["image"] for part in image_parts(prompt)]
    found = [int(number) for message in messages for number in _PLACES.findall(message["content"] or "")]
    if found and found != list(range(len(images))):
        raise ValueError(
            f"The privileged context {context} changed which images the prompt has: of {len(images)}, it returned "
            f"number {', '.join(str(number + 1) for number in found)}. Keep the user's messages as they are, or leave "
            "all of their text out."
        )
    made = [
        {**message, "content": _parts(message["content"], images)} if isinstance(message["content"], str) else message
        for message in messages
    ]
    before = [] if found else images
    if not before and not teacher_images:
        return made
    last = last_user_turn(made)
    content = [*map(_image, before), *made[last]["content"]]
    after = max((index + 1 for index, part in enumerate(content) if part["type"] == "image"), default=0)
    made[last] = {**made[last], "content": [*content[:after], *map(_image, teacher_images), *content[after:]]}
    return made


def _image(image: Any) -> dict[str, Any]:
    return {"type": "image", "image": image}


def _parts(text: str, images: list[Any]) -> list[dict[str, Any]]:
    pieces = _PLACES.split(text)
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        if index % 2:
            parts.append(_image(images[int(piece)]))
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts or [{"type": "text", "text": ""}]
