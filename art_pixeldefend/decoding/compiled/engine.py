"""From a model and a batch to threads that each walk over a few images."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from art_pixeldefend.decoding.compiled import program
from art_pixeldefend.decoding.compiled.kernels import KERNELS
from art_pixeldefend.decoding.compiled.plan import FLOAT, Plan
from art_pixeldefend.density import PixelCNNpp

LOCKSTEP = 8  # images that walk together at most: they share each weight that is read


class Latest:
    """The plan of the model that was decoded with last, kept for as long as its parameters stay what they are.

    They are compared value by value, a few milliseconds in place of several times that: version counters miss changes
    through ``.data``.
    """

    def __init__(self) -> None:
        self._kept: tuple[weakref.ref[PixelCNNpp], list[Tensor], Plan] | None = None  # one object: threads may race

    def plan(self, pixel_cnn: PixelCNNpp) -> Plan:
        """The plan of this model as it is now."""
        parameters = [parameter.detach() for parameter in pixel_cnn.parameters()]
        if self._kept is not None:
            model, known, plan = self._kept
            if model() is pixel_cnn and all(map(torch.equal, parameters, known)):
                return plan
        plan = Plan(pixel_cnn)
        self._kept = weakref.ref(pixel_cnn), [parameter.clone() for parameter in parameters], plan
        return plan


latest = Latest()


@torch.no_grad()
def decode(pixel_cnn: PixelCNNpp, x: Tensor, eps: int) -> Tensor:
    """Purified levels (N, C, H, W) of levels ``x``, on as many threads as torch uses.

    Each image takes ``Plan.model["stride"]`` bytes while it is walked over, at most LOCKSTEP images a thread.
    """
    levels = x.cpu().contiguous().numpy()
    purified = np.empty_like(levels)
    plan = latest.plan(pixel_cnn)
    threads = torch.get_num_threads()
    together = min(LOCKSTEP, -(-len(levels) // threads)) or 1
    groups = [slice(first, first + together) for first in range(0, len(levels), together)]
    with ThreadPoolExecutor(min(threads, len(groups)) or 1) as pool:
        list(pool.map(lambda group: _walk(plan, levels[group], eps, purified[group]), groups))
    return torch.from_numpy(purified).to(x.device)


def _walk(plan: Plan, x: np.ndarray, eps: int, purified: np.ndarray) -> None:
    caches = np.zeros(len(x) * plan.model[0]["stride"] // FLOAT, dtype=np.float32)
    _set_ones(plan, caches.reshape(len(x), -1))
    walk = make_walk(plan, caches, len(x))
    program.decode(walk, plan.model, plan.levels, plan.layers, plan.nodes, x, eps, purified)


def make_walk(plan: Plan, caches: np.ndarray, images: int) -> program.Walk:
    """What the walk needs to know of the plan, and of the caches of so many images."""
    model = plan.model[0]
    plain = FLOAT * plan.filters
    sizes = (int(model[name]) for name in ("scratch", "filters", "narrow", "wide"))
    addresses = (kernel.address for kernel in KERNELS)
    where = (caches.ctypes.data, int(model["stride"]), images, plan.weights.ctypes.data)
    return program.Walk(*where, *sizes, plain, 2 * plain, *addresses)


def _set_ones(plan: Plan, caches: np.ndarray) -> None:
    """The channel of ones, which tells the zeros of the image from those of the padding."""
    height, width = plan.levels[0]["height"], plan.levels[0]["width"]
    first = plan.model[0]["image"] // FLOAT
    image = caches[:, first : first + (height + 2) * (width + 2) * (plan.channels + 1)]
    image.reshape(-1, height + 2, width + 2, plan.channels + 1)[:, 2:, 1:-1, -1] = 1.0
