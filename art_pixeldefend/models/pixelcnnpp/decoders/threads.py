"""Images shared out among threads: what is done at a pixel is too little for torch to share it out well itself."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

AWAKE = 1e-6  # seconds between looks at the interpreter's lock: whoever sleeps until it is free wakes up too late

_sharing = threading.Lock()


def share_out(work: Callable[[int, int], Tensor], count: int, device: torch.device) -> Tensor:
    """``work(first, end)`` of the images 0..count, put together: on a CPU with as many threads as torch would use.

    Each has its part of the images, and no other threads inside torch's operations. Torch keeps the number of threads
    of its own loops for each thread (one that starts takes over what was set last), that of MKL for all of them: it is
    set before they start, and set back when they are done. Meanwhile another call's threads have to wait.
    """
    threads = torch.get_num_threads()
    parts = min(threads, count) if device.type == "cpu" else 1
    if parts < 2:
        return work(0, count)
    edges = [count * part // parts for part in range(parts + 1)]
    with _sharing, _single_threaded_operations(), ThreadPoolExecutor(parts) as pool:
        return torch.cat(list(pool.map(work, edges[:-1], edges[1:])))


@contextmanager
def _single_threaded_operations() -> Iterator[None]:
    """No threads inside torch's operations; Python's own, of which there are many calls, wait for one another awake."""
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(AWAKE)
    try:
        yield
    finally:
        sys.setswitchinterval(interval + 5e-7)  # it is cut down to whole microseconds
        torch.set_num_threads(threads)
