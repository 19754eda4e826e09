"""Parameters that are set all together or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def all_or_none(holder: Any) -> Iterator[None]:
    """If what is done inside raises, the attributes of ``holder`` are afterwards what they were before."""
    before = dict(vars(holder))
    try:
        yield
    except BaseException:
        vars(holder).clear()
        vars(holder).update(before)
        raise
