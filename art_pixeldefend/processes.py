"""Several processes on one grid: who does what, and who knows of whose failure."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Team:
    """The processes that ``torchrun`` started, or the one there is.

    Args:
        rank: this process's number.
        world: how many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    def share(self, tasks: Sequence[T]) -> Sequence[T]:
        """This process's part of ``tasks``."""
        return tasks[self.rank :: self.world]

    def gather(self, mine: Any) -> list[Any]:
        """What every process gives, by rank; all of them have to come here."""
        if self.world == 1:
            return [mine]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, mine)
        return everyone


@contextmanager
def team() -> Iterator[Team]:
    """Joins the processes of ``torchrun``, if it started this one."""
    if not dist.is_torchelastic_launched():
        yield Team()
        return
    # gloo on GPUs too: what is exchanged is small. One may train for hours while others wait.
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
        dist.barrier()  # nobody closes connections that another may still use
    finally:
        dist.destroy_process_group()
