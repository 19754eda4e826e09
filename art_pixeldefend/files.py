"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from os import PathLike
from pathlib import Path


def write_atomically(path: str | PathLike[str], content: bytes | str) -> None:
    """Write beside ``path``, flush to the disk, then rename: a reader finds the old file or the new one.

    Folders on the way are made. A link stays one: what it points to is replaced. What is no file (``/dev/stdout``, a
    pipe) is written to as it is.

    Raises:
        OSError: if the file cannot be written; nothing partial is left.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
