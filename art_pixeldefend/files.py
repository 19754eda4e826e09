"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from os import PathLike
from pathlib import Path


def write_atomically(path: str | PathLike[str], content: bytes | str) -> None:
    """Write beside ``path``, flush to the disk, then rename: a reader finds the old file or the new one.

    Folders on the way are made.

    Raises:
        OSError: if the file cannot be written; nothing partial is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
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
