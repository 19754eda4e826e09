"""One process group per process, shared by training, grids and the command line.

``torchrun`` starts several processes of the same program. Each calls :func:`process_group` where it needs the others::

    group = process_group()
    results = {task: compute(task) for task in group.shard(tasks)}
    everyone = group.gather(results)  # waits for the slowest process, however long that takes

The group is created at the first call, reused by later ones and destroyed when the process exits.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)  # for one exchange between processes that have all arrived at it
LONGEST_PAUSE = 1.0  # seconds between two looks at how many processes have arrived
T = TypeVar("T")

_own: ProcessGroup | None = None
_own_world: Any = None  # torch's handle of the group that belongs to `_own`
_created = 0


class ProcessGroup:
    """The processes that work together, as one of them sees it.

    Args:
        rank: number of this process, from 0.
        world_size: how many processes there are.
        store: key-value store that the processes share. Without one, :meth:`wait` is a barrier with the time limit of
            the group that the caller created.

    Example:
        >>> group = process_group()  # without torchrun
        >>> group.world_size, group.gather("result")
        (1, ['result'])
    """

    def __init__(self, rank: int = 0, world_size: int = 1, store: dist.Store | None = None) -> None:
        self.rank, self.world_size, self._store, self._waits = rank, world_size, store, 0

    @property
    def device(self) -> torch.device:
        """This process's GPU where there are GPUs, else the CPU."""
        gpus = torch.cuda.device_count()
        return (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)) % gpus) if gpus else torch.device("cpu")
        )

    def shard(self, tasks: Sequence[T]) -> Sequence[T]:
        """Every ``world_size``-th of ``tasks``, starting with this process's rank."""
        return tasks[self.rank :: self.world_size]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank. Every process has to call this.

        Raises:
            RuntimeError: if a process ended without calling it.
        """
        if self.world_size == 1:
            return [value]
        self.wait()
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def map(self, function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, *, verbose: bool = False) -> np.ndarray:
        """Apply ``function`` to images, of which each process computes its shard. Every process gets all results.

        Args:
            function: maps images (M, ...), M possibly 0, to an array of M results.
            x: images (N, ...), the same in every process.
            verbose: print how many images per second all processes did together.

        Raises:
            RuntimeError: if a process ended without calling it.
        """
        began = time.perf_counter()
        parts = self.gather(function(x[self.rank :: self.world_size]))
        result = np.empty((len(x), *parts[0].shape[1:]), parts[0].dtype)
        for rank, part in enumerate(parts):
            result[rank :: self.world_size] = part
        if verbose and self.rank == 0:
            rate, processes = len(x) / (time.perf_counter() - began), f"process{'es' * (self.world_size > 1)}"
            print(f"{rate:.1f} images/s, {self.world_size} {processes}", file=sys.stderr)
        return result

    def wait(self) -> None:
        """Return once every process has called this, without a time limit.

        Use it before collective operations of your own (an all-reduce, DDP) when other processes may still be busy for
        longer than ``TIMEOUT``: one may train a classifier for hours while the others have nothing to do.

        Raises:
            RuntimeError: if a process ended without calling it.
        """
        if self.world_size == 1:
            return
        if self._store is None:
            dist.barrier()
            return
        self._waits += 1
        key, pause = f"arrived/{self._waits}", 0.001
        arrived = self._store.add(key, 1)
        while arrived < self.world_size:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            ended = self._store.add("ended", 0)  # read first: whoever arrives last may end at once
            arrived = self._store.add(key, 0)
            if ended and arrived < self.world_size:
                raise RuntimeError(f"{ended} of {self.world_size} processes ended while process {self.rank} waits")

    def leave(self) -> None:
        """Tell processes that wait, now or later, that this one has ended."""
        if self._store is not None:
            self._store.add("ended", 1)


def process_group() -> ProcessGroup:
    """Return the processes that ``torchrun`` started, or this one alone.

    A default process group that the caller has created is used as it is. Otherwise the first call under ``torchrun``
    creates one. Its operations on CPU tensors go through gloo, those on GPU tensors through NCCL, whose connections are
    made when first needed.
    """
    global _own, _own_world, _created
    if not dist.is_available():
        return ProcessGroup()
    if _own is not None and _own_is_current():
        return _own
    if dist.is_initialized():
        return ProcessGroup(dist.get_rank(), dist.get_world_size())
    if not dist.is_torchelastic_launched():
        return ProcessGroup()
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    _created += 1  # a group that replaces a destroyed one must not find the keys of that
    store = dist.PrefixStore(f"art_pixeldefend/{_created}", store)
    _own = ProcessGroup(rank, world_size, store)
    if torch.cuda.is_available():
        torch.cuda.set_device(_own.device)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    _own_world = dist.group.WORLD
    atexit.unregister(_leave)
    atexit.register(_leave)
    return _own


def _own_is_current() -> bool:
    """Whether torch's default group is the one that was created here: a caller may have replaced it."""
    return dist.is_initialized() and dist.group.WORLD is _own_world


def _leave() -> None:
    """Destroy the own group while the interpreter still runs: gloo's threads that end later can abort the process."""
    global _own, _own_world
    own, current = _own, _own_is_current()
    _own = _own_world = None  # torch ends the threads with the last reference to the group
    if own is not None and current:
        with suppress(dist.DistError):  # where another process hosts the store, it may be gone
            own.leave()
        dist.destroy_process_group()
