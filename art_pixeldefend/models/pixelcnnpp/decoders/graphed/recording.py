"""The cached walk as CUDA graphs: what it launches is noted once, and launched again all at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.decoders.cached.parts import PERIOD
from art_pixeldefend.models.pixelcnnpp.decoders.cached.rows import Steps
from art_pixeldefend.models.pixelcnnpp.decoders.cached.walk import Walk
from art_pixeldefend.models.pixelcnnpp.decoders.graphed import kernels
from art_pixeldefend.models.pixelcnnpp.network import STAGES

CYCLE = 2 << (STAGES - 1)  # rows after which a walk comes to the same memory again: two of the coarsest level
ITERATED = 64  # images up to which whole rows are repeated, rather than a row done pixel by pixel


class FusedSteps(Steps):
    """The steps with fewer and larger kernels."""

    def concat_elu(self, x: Tensor, out: Tensor) -> None:
        """elu(x) and elu(-x), one above the other, into ``out`` (n, 2 F, N), whose upper half ``x`` may be."""
        self.calls.append(partial(kernels.concat_elu, x, out))

    def gate(self, x: Tensor, ab: Tensor, out: Tensor, active: Tensor) -> None:
        """``out`` = ``x`` + a sigmoid(b), a and b one above the other, and its concat_elu."""
        self.calls.append(partial(kernels.gate, x, ab, out, active))


class Graphs:
    """Pieces of work, each run as it is the first time, and as a CUDA graph from then on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[object, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def run(self, name: object, work: Callable[[], None]) -> None:
        """Do ``work``, which is the same whenever it has this name."""
        if graph := self._known.get(name):
            graph.replay()
            return
        work()
        if self._device.type == "cuda":
            self._known[name] = self._capture(work)

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph


class Recording:
    """Everything that ``count`` images need, in memory of its own.

    Args:
        pixel_cnn: the density model.
        count: images N.
        eps: radius in levels.
    """

    def __init__(self, pixel_cnn: PixelCNNpp, count: int, eps: int) -> None:
        channels, self.height, self.width = pixel_cnn.image_shape
        self.count, self.eps = count, eps
        self._weights = weights_of(pixel_cnn)
        self._walk = Walk(pixel_cnn, count, FusedSteps)
        self._x = torch.zeros(self.width, count, channels, dtype=torch.uint8, device=pixel_cnn.device)
        self._levels = torch.zeros_like(self._x)
        self._changed = torch.zeros((), dtype=torch.int32, device=pixel_cnn.device)
        self._graphs = Graphs(pixel_cnn.device)
        self._lock = Lock()

    def fits(self, pixel_cnn: PixelCNNpp, count: int, eps: int) -> bool:
        """Is it of this model as it is now, and of so many images, or somewhat more?"""
        if eps != self.eps or not count <= self.count <= max(2 * count, 8):
            return False
        now = weights_of(pixel_cnn)
        return (now.dtype, now.device) == (self._weights.dtype, self._weights.device) and now.equal(self._weights)

    def decode(self, x: Tensor) -> Tensor:
        """Purified levels of ``x`` (N, C, H, W), up to ``count`` of them."""
        with self._lock:
            self._walk.memory.clear()
            found = x.permute(2, 3, 0, 1).clone(memory_format=torch.contiguous_format)  # one grey image would be `x`
            settle = self._settle_by_iteration if self.count <= ITERATED else self._settle_by_pixels
            for row in range(self.height):
                self._x[:, : len(x)] = found[row]
                self._levels.copy_(self._x)
                settle(row % CYCLE)
                found[row] = self._levels[:, : len(x)]
            return found.permute(2, 3, 0, 1).contiguous()

    def _settle_by_pixels(self, row: int) -> None:
        self._graphs.run(row, lambda: self._do_pixels(row))

    def _settle_by_iteration(self, row: int) -> None:
        """Columns up to the first that changes are final each time (Song et al. 2020, arXiv:2002.03629)."""
        self._graphs.run(("begin", row), lambda: self._begin(row))
        for _ in range(self.width):
            self._graphs.run(row, lambda: self._repeat(row))
            if not self._changed.item():
                break

    def _begin(self, row: int) -> None:
        self._walk.begin_row(row)
        self._walk.know(row, 0, self._levels)

    def _repeat(self, row: int) -> None:
        self._changed.zero_()
        self._choose(row, 0, self.width)

    def _do_pixels(self, row: int) -> None:
        self._walk.begin_row(row)
        for column in range(self.width):
            self._choose(row, column, column + 1)

    def _choose(self, row: int, first: int, end: int) -> None:
        params = self._walk.stretch(row, first, end)
        image = self._walk.image[row % PERIOD, first + 1 : end + 1, :-1]
        kernels.choose(params, self._x[first:end], self._levels[first:end], image, self._changed, self.eps)


def weights_of(pixel_cnn: PixelCNNpp) -> Tensor:
    """All of the model's parameters, one after the other: a copy, to be compared with."""
    return torch.cat([parameter.detach().flatten() for parameter in pixel_cnn.parameters()])
