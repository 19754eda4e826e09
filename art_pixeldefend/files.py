"""Atomic writes, and checks that a path is writable before a long computation starts."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path


def write_atomically(path: str | PathLike[str], content: bytes | str) -> None:
    """Write ``content`` to ``path``, as :func:`replacing` does.

    What is not a regular file (``/dev/stdout``, a pipe) is written to as it is.

    Raises:
        OSError: if the file cannot be written; nothing partial is left.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    with replacing(path) as partial:
        partial.write_bytes(data)


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write a file to; flush it to the disk and rename it to ``path``.

    A reader finds the old file or the new one, also after a power cut. Missing folders are created. A symbolic link
    is kept: the file that it points to is replaced.

    Raises:
        OSError: if the file cannot be written; nothing partial is left.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_file(path: str | PathLike[str]) -> None:
    """Whether a file could be written to ``path``, over an old one or in a folder yet to be made.

    Raises:
        ValueError: naming ``path``: a folder, or in a place where nothing can be made.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder, where a file is to be written")
    if path.is_file() or not path.exists():  # a device or a pipe is written to as it is
        _check_place(path)


def check_folder(path: str | PathLike[str]) -> None:
    """Whether a folder could be put at ``path``, in place of nothing or of an empty one.

    Raises:
        ValueError: naming ``path``: not an empty folder, the current one, or in a place where nothing can be made.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{str(path)!r} exists already and is not an empty folder")
    if path.resolve() == Path.cwd():
        raise ValueError(f"{str(path)!r} is the current folder, which cannot be replaced")
    _check_place(path)


def _check_place(path: Path) -> None:
    """The nearest folder above that exists must be one, and open to new entries."""
    above = next(parent for parent in path.resolve().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{str(path)!r} cannot be written: {str(above)!r} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{str(path)!r} cannot be written: no permission in {str(above)!r}")
