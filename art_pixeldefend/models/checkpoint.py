"""Tensors and a JSON header in one safetensors file: written whole or not at all, read without unpickling."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from art_pixeldefend.files import write_atomically

KEY = "art_pixeldefend"  # safetensors' metadata maps strings to strings; ours is one JSON text under this key


def write(path: str | PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write ``tensors`` and the JSON-serialisable ``header`` to ``path``.

    Raises:
        TypeError: if the header holds what JSON does not know.
        OSError: if the file cannot be written; whatever was at ``path`` is then still there.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(contiguous, metadata={KEY: json.dumps(header)}))


def read(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the header that :func:`write` put there.

    Raises:
        FileNotFoundError: if there is no file at ``path``.
        ValueError: if the file is truncated, corrupted, or not written by :func:`write`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path {os.fspath(path)!r} is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[KEY])
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"path {os.fspath(path)!r} is truncated, corrupted or no checkpoint of ours: {error}"
        ) from error
