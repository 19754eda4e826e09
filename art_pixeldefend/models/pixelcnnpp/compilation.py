"""Compilation with Numba: whether it is possible here, its cache on disk, and a notice that it takes a while."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from tqdm import tqdm


@cache
def has_numba() -> bool:
    """Whether Numba can be imported and is not disabled by ``NUMBA_DISABLE_JIT``."""
    try:
        from numba import config
    except Exception:  # an installed Numba that does not fit this Python or NumPy raises various errors
        return False
    return not config.DISABLE_JIT  # type: ignore[attr-defined]  # made at run time


def jit(*signature: Any, **options: Any) -> Callable[[Callable], Callable]:
    """``numba.njit`` with a cache on disk, or without one where Numba finds no writable folder.

    Args:
        signature: of the function, to compile it at once; by default it is compiled at the first call.
        options: further options of ``numba.njit``.
    """
    import numba

    njit: Any = numba.njit
    options |= {"error_model": "numpy", "nogil": True}

    def decorate(function: Callable) -> Callable:
        try:
            with _users_cache():
                return njit(*signature, cache=True, **options)(function)
        except RuntimeError as error:
            if "cannot cache function" not in str(error):
                raise
            _warn_of_no_cache()
            return njit(*signature, **options)(function)

    return decorate


@contextmanager
def _users_cache() -> Iterator[None]:
    """Let Numba cache in the user's folder for caches: files beside the source would stay when pip uninstalls it.

    Where that folder is not writable, Numba tries the folder of the source.
    """
    import pooch
    from numba import config

    before: str = config.CACHE_DIR  # type: ignore[attr-defined]  # of NUMBA_CACHE_DIR
    config.CACHE_DIR = before or os.path.join(pooch.os_cache("art-pixeldefend"), "numba")  # type: ignore[attr-defined]
    try:
        yield
    finally:
        config.CACHE_DIR = before  # type: ignore[attr-defined]


@cache
def _warn_of_no_cache() -> None:
    """Warn once per process."""
    warnings.warn(
        "Numba finds no writable folder for compiled code and has to compile it in every process, which takes seconds; "
        "set the environment variable NUMBA_CACHE_DIR to a writable folder",
        RuntimeWarning,
        stacklevel=2,
    )


@contextmanager
def compilation_notice() -> Iterator[None]:
    """Say on standard error that code is being compiled, if and when that begins inside the context."""
    if not has_numba():
        yield
        return
    from numba.core import event

    class Notice(event.Listener):
        given = False

        def on_start(self, event: Any) -> None:
            if not self.given:
                tqdm.write("compiling for this processor, once; this takes some seconds ...", file=sys.stderr)
                sys.stderr.flush()
            self.given = True

        def on_end(self, event: Any) -> None:
            pass

    with event.install_listener("numba:compile", Notice()):
        yield
