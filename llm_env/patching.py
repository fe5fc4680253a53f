"""Setting attributes of an object for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(owner: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes of an object within the block; those of its class, and the modules of a module, reappear after it."""
    instance = vars(owner)
    before = {name: instance[name] for name in attributes if name in instance}
    instance.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            instance.pop(name, None)
        instance.update(before)
