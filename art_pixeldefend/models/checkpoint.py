"""Safetensors files with a JSON header: written atomically, read without unpickling."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from art_pixeldefend.files import replacing, temporary_folder

FORMAT = 1
RUN = "training-run"  # the kind of checkpoints; models have kinds of their own
KEY = "art_pixeldefend"  # the metadata of safetensors maps strings to strings; the header is JSON under this key


def write(path: str | PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write ``tensors`` and ``header`` to ``path``; the header gets an entry ``format``. An existing file is replaced.

    Raises:
        TypeError: if the header holds values that JSON cannot represent.
        OSError: if the file cannot be written; a file that was at ``path`` is then still there.
    """
    text = json.dumps({"format": FORMAT, **header})
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial, temporary_folder(path) as folder:
        partial.touch()
        file = folder / partial.name
        save_file(contiguous, file, metadata={KEY: text})  # leaves files of other names beside `file` if it is killed
        file.chmod(partial.stat().st_mode)  # safetensors makes files that only their owner can read
        file.replace(partial)


def read(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the header that :func:`write` put there.

    Raises:
        FileNotFoundError: if there is no file at ``path``.
        ValueError: if the file is truncated, corrupted, not written by :func:`write`, or of a newer format.
    """
    with _opened(path) as (file, header):
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118


def read_header(path: str | PathLike[str]) -> dict[str, Any]:
    """The header alone, without reading the tensors.

    Raises:
        FileNotFoundError, ValueError: as :func:`read`.
    """
    with _opened(path) as (_, header):
        return header


@contextmanager
def _opened(path: str | PathLike[str]) -> Iterator[tuple[Any, dict[str, Any]]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"path {os.fspath(path)!r} is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[KEY])
            if header.get("format", 0) > FORMAT:
                raise ValueError(f"format {header['format']} was written by a newer version of art-pixeldefend")
            yield file, header
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"path {os.fspath(path)!r} is truncated, corrupted or not a file of art-pixeldefend: {error}"
        ) from error
