"""Attributes that have other values for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def changed(target: Any, **values: Any) -> Iterator[None]:
    """Inside, attributes of an object, or names of a module, have other values."""
    originals = {name: getattr(target, name) for name in values}
    vars(target).update(values)
    try:
        yield
    finally:
        vars(target).update(originals)
