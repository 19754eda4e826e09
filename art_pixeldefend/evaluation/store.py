"""Results stored under a hash of the settings that made them, each written completely or not at all."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from art_pixeldefend.files import write_atomically
from art_pixeldefend.levels import UNIT, from_levels, to_levels

Settings = Mapping[str, Any]


def digest(settings: Settings) -> str:
    """Return 20 hexadecimal digits that identify JSON-serialisable settings; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]


class Store:
    """A folder of arrays and JSON files, each named by its kind and the :func:`digest` of its settings.

    Processes may share it: if two compute the same result, the second replaces it by an equal one.

    Args:
        folder: created when the first result is written.

    Example:
        >>> store = Store("work")
        >>> store.write("cells", {"eps": 8}, {"correct": 93})
        >>> store.read("cells", {"eps": 8})
        {'correct': 93}
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)

    def path(self, kind: str, settings: Settings, suffix: str) -> Path:
        """Return the file of a result, which may not exist yet."""
        return self.folder / kind / f"{digest(settings)}{suffix}"

    def images(self, kind: str, settings: Settings, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Return images (N, ...) in [0, 1], float32: those stored, or computed and stored now.

        8-bit images are stored as bytes, others as float32.
        """
        path = self.path(kind, settings, ".npy")
        if not path.is_file():
            images = compute().astype(np.float32)
            levels = to_levels(images, UNIT)
            buffer = io.BytesIO()
            np.save(buffer, levels if np.array_equal(from_levels(levels, UNIT), images) else images)
            write_atomically(path, buffer.getvalue())
        kept = np.load(path, allow_pickle=False)
        return from_levels(kept, UNIT) if kept.dtype == np.uint8 else kept

    def read(self, kind: str, settings: Settings) -> dict[str, Any] | None:
        """Return a stored JSON result, or None if there is none."""
        path = self.path(kind, settings, ".json")
        return json.loads(path.read_text()) if path.is_file() else None

    def write(self, kind: str, settings: Settings, result: Settings) -> None:
        """Store a JSON result."""
        write_atomically(self.path(kind, settings, ".json"), json.dumps(result, indent=1, sort_keys=True) + "\n")
