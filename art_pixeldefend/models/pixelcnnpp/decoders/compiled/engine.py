"""From a model and a batch to threads that each walk over a few images."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.decoders.compiled import program
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.crew import ALONE, CREW, GIVE_WAY, Crew, make_board
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.fingerprint import fingerprint
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.kernels import KERNELS
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.plan import FLOAT, Plan
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.walk import Walk

LOCKSTEP = 8  # images that walk together at most: they share each weight that is read


class Latest:
    """The plan of the model that was decoded with last, kept for as long as its parameters stay what they are.

    Their contents are hashed on every call, which takes a twentieth of decoding one: version counters miss changes
    through ``.data``.
    """

    def __init__(self) -> None:
        # One object: threads may race.
        self._kept: tuple[weakref.ref[PixelCNNpp], bytes, Plan] | None = None

    def plan(self, pixel_cnn: PixelCNNpp) -> Plan:
        """The plan of this model as it is now."""
        contents = fingerprint(pixel_cnn)
        if self._kept is not None:
            model, known, plan = self._kept
            if model() is pixel_cnn and known == contents:
                return plan
        plan = Plan(pixel_cnn)
        self._kept = weakref.ref(pixel_cnn), contents, plan
        return plan


latest = Latest()


@torch.no_grad()
def decode(pixel_cnn: PixelCNNpp, x: Tensor, eps: int) -> Tensor:
    """Purified levels (N, C, H, W) of levels ``x``, on as many threads as torch uses.

    Each image takes ``Plan.model["stride"]`` bytes while it is walked over, at most LOCKSTEP images a thread. Where
    there are threads enough, a crew of two walks over each image.
    """
    levels = x.cpu().contiguous().numpy()
    purified = np.empty_like(levels)
    plan = latest.plan(pixel_cnn)
    threads = torch.get_num_threads()
    if 0 < CREW * len(levels) <= threads:
        walks = [walk for i in range(len(levels)) for walk in _in_company(plan, levels[i:][:1], eps, purified[i:][:1])]
    else:
        together = min(LOCKSTEP, -(-len(levels) // threads)) or 1
        groups = [slice(first, first + together) for first in range(0, len(levels), together)]
        walks = [partial(_alone, plan, levels[group], eps, purified[group]) for group in groups]
    _run(walks, threads)
    return torch.from_numpy(purified).to(x.device)


def _run(walks: list[Callable[[], None]], threads: int) -> None:
    """On so many threads, this one among them. None begins before all are there: members of a crew wait for others."""
    todo, all_there = iter(walks), threading.Event()

    def work() -> None:
        all_there.wait()
        for walk in todo:
            walk()

    others = max(0, min(threads, len(walks)) - 1)
    with ThreadPoolExecutor(others or 1) as pool:  # which starts no thread before there is work for it
        try:
            started = [pool.submit(work) for _ in range(others)]
        except BaseException:
            todo = iter(())
            raise
        finally:
            all_there.set()
        work()
        for other in started:
            other.result()


def _alone(plan: Plan, x: np.ndarray, eps: int, purified: np.ndarray) -> None:
    """Walk over a few images in lock-step."""
    caches = _caches(plan, len(x), len(x) * int(plan.model[0]["stride"]))
    walk = make_walk(plan, caches, len(x))
    program.decode(walk, ALONE, plan.model, plan.levels, plan.layers, plan.nodes, x, eps, purified)


def _in_company(plan: Plan, x: np.ndarray, eps: int, purified: np.ndarray) -> list[Callable[[], None]]:
    """What each member of a crew does for one image; all of them have to run at the same time."""
    caches, board = _caches(plan, 1, plan.bytes_of_crew), make_board(CREW)
    walk = make_walk(plan, caches, 1)
    tables = plan.model, plan.levels, plan.layers_of_crew, plan.nodes

    def member(crew: Crew) -> None:
        program.decode(walk, crew, *tables, x, eps, purified)
        _ = caches, board  # walk and crew hold their addresses only

    return [partial(member, Crew(number, CREW, board.ctypes.data, GIVE_WAY)) for number in range(CREW)]


def _caches(plan: Plan, images: int, size: int) -> np.ndarray:
    """Zeros, but for the channel of ones, which tells the zeros of the image from those of the padding."""
    caches = np.zeros(size // FLOAT, dtype=np.float32)
    height, width = plan.levels[0]["height"], plan.levels[0]["width"]
    first, stride = plan.model[0]["image"] // FLOAT, plan.model[0]["stride"] // FLOAT
    for start in range(first, first + images * stride, stride):
        image = caches[start : start + (height + 2) * (width + 2) * (plan.channels + 1)]
        image.reshape(height + 2, width + 2, plan.channels + 1)[2:, 1:-1, -1] = 1.0
    return caches


def make_walk(plan: Plan, caches: np.ndarray, images: int) -> Walk:
    """What the walk needs to know of the plan, and of the caches of so many images."""
    model = plan.model[0]
    plain = FLOAT * plan.filters
    sizes = (int(model[name]) for name in ("scratch", "filters", "narrow", "wide"))
    addresses = (kernel.address for kernel in KERNELS)
    where = (caches.ctypes.data, int(model["stride"]), images, plan.weights.ctypes.data)
    return Walk(*where, *sizes, plain, 2 * plain, *addresses)
