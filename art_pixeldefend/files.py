"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
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
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _umask() -> int:
    """The process's umask: mkstemp makes private files, an ordinary open would not."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
