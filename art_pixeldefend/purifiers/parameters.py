"""Setting parameters all together or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def all_or_none(holder: Any) -> Iterator[None]:
    """Restore the attributes of ``holder`` if the body of the context raises."""
    before = dict(vars(holder))
    try:
        yield
    except BaseException:
        vars(holder).clear()
        vars(holder).update(before)
        raise
