"""Atomic writes, and checks that a path is writable before a long computation starts."""

from __future__ import annotations

import csv
import glob
import io
import os
import secrets
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from os import PathLike
from pathlib import Path
from typing import Any

CHECKPOINT, METRICS, MODEL = "checkpoint.safetensors", "metrics.jsonl", "model.safetensors"
SAMPLES = "samples.png"  # which the command line adds
RUN_FILES = (CHECKPOINT, MODEL, METRICS, SAMPLES)  # the files of a training run
TOKEN_BYTES = 8  # of the random part in the names of temporary files


def write_atomically(path: str | PathLike[str], content: bytes | str) -> None:
    """Write ``content`` to ``path``, as :func:`replacing` does.

    A path that is not a regular file, such as a pipe or ``/dev/null``, is written to and not replaced. So is a file
    descriptor of this process, such as ``/dev/stdout``: what was written to it before stays.

    Raises:
        OSError: if the file cannot be written; nothing partial is left.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    if (descriptor := _descriptor(path)) is not None:
        sys.stdout.flush()
        with open(os.dup(descriptor), "wb") as file:
            file.write(data)
    elif path.exists() and not path.is_file():
        path.write_bytes(data)
    else:
        with replacing(path) as partial:
            partial.write_bytes(data)


def write_csv(path: str | PathLike[str], columns: Mapping[str, Collection[Any]]) -> None:
    """Write columns of one length with their names in the first line; floats have all digits that distinguish them.

    Raises:
        OSError: if the file cannot be written; nothing partial is left.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_atomically(path, buffer.getvalue())


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` for a file or folder; flush it to the disk and rename it to ``path``.

    A reader finds the old file or the new one, also after a power cut. Missing folders above ``path`` are created. A
    symbolic link is kept: what it points to is replaced. An old folder is removed with all that it holds.

    If the body raises, the temporary path is removed and ``path`` is as before. A process that is killed, as by an
    unhandled SIGTERM, leaves the temporary path, ``.NAME.<16 digits>.partial``, which :func:`remove_temporaries`
    removes; if it was replacing a folder, perhaps the old one under the same name ending in ``.old``.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _temporary(path, secrets.token_hex(TOKEN_BYTES))
    old = partial.with_suffix(".old")
    try:
        yield partial
        with ThreadPoolExecutor(32) as threads:  # file systems commit simultaneous flushes together
            list(threads.map(_flush, [partial, *partial.rglob("*")]))
        if path.is_dir() and partial.is_dir():
            path.rename(old)  # os.replace takes empty folders only
        os.replace(partial, path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        partial.unlink() if partial.is_file() else shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def temporary_folder(path: str | PathLike[str]) -> Iterator[Path]:
    """Yield a new folder beside ``path``, which is removed at the end with all that it holds."""
    folder = _temporary(Path(path).resolve(), secrets.token_hex(TOKEN_BYTES))
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_temporaries(path: str | PathLike[str]) -> None:
    """Remove the temporary files and folders that killed processes have left while they wrote ``path``."""
    path = Path(path).resolve()
    pattern = _temporary(path.with_name(glob.escape(path.name)), "[0-9a-f]" * 2 * TOKEN_BYTES)
    for found in list(path.parent.glob(pattern.name)):
        found.unlink() if found.is_file() or found.is_symlink() else shutil.rmtree(found, ignore_errors=True)


def check_file(path: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Check that a file can be written to ``path``.

    Args:
        path: where a file is to be written; missing folders above it will be created.
        overwrite: accept a file that exists.

    Raises:
        ValueError: naming ``path``, if it is a folder, exists and may not be overwritten, or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder, where a file is to be written")
    if _descriptor(path) is not None or (path.exists() and not path.is_file()):
        return  # written to as it is
    if path.exists() and not overwrite:
        raise ValueError(f"{str(path)!r} exists already; overwrite=True replaces it")
    _check_parent(path)


def check_folder(path: str | PathLike[str], *, overwrite: bool = False, suffix: str | None = None) -> None:
    """Check that a folder can be written to ``path``, where nothing or an empty folder is.

    Args:
        path: where a folder is to be written; missing folders above it will be created.
        overwrite: accept a folder that is not empty.
        suffix: of files that will be replaced together with the folder: one that holds others is never accepted.

    Raises:
        ValueError: naming ``path``, if it is a file, a folder that is not empty and may not be overwritten, or the
            current folder, or if it cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file, where a folder is to be written")
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"{str(path)!r} is a folder that is not empty; overwrite=True replaces its files")
        for entry in path.rglob("*") if suffix else ():
            if entry.is_symlink() or not (entry.is_dir() or entry.suffix == suffix):
                raise ValueError(
                    f"{str(path)!r} cannot be replaced: it holds {str(entry)!r}, which is not a {suffix} file"
                )
    if suffix and path.resolve() == Path.cwd():
        raise ValueError(f"{str(path)!r} is the current folder, which cannot be replaced")
    _check_parent(path)


def is_standard_output(path: str | PathLike[str]) -> bool:
    """Whether ``path`` names the standard output of this process, as ``/dev/stdout`` does."""
    return _descriptor(Path(path)) == 1


def _descriptor(path: Path) -> int | None:
    """The file descriptor of this process that an existing path names, as ``/dev/stdout`` and ``/dev/fd/3`` do."""
    while path.exists():
        folder = path.parent.resolve()
        if path.name.isdecimal() and folder == Path("/dev/fd").resolve():
            return int(path.name)
        if not path.is_symlink():
            break
        path = folder / path.readlink()
    return None


def _temporary(path: Path, token: str) -> Path:
    return path.with_name(f".{path.name}.{token}.partial")


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    folder = path.is_dir()
    with suppress(OSError) if folder else nullcontext():  # not every file system can do it for folders
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_parent(path: Path) -> None:
    """Check that the nearest existing path above ``path`` is a folder in which files can be created."""
    above = next(parent for parent in path.resolve().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{str(path)!r} cannot be written: {str(above)!r} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{str(path)!r} cannot be written: no permission in {str(above)!r}")
