"""Decoding with CUDA graphs: the kernels of a row are captured once and launched together afterwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.decoders.graphed import kernels
from art_pixeldefend.models.pixelcnnpp.decoders.incremental import (
    CYCLE,
    PERIOD,
    IncrementalNetwork,
    Memory,
    Operations,
)
from art_pixeldefend.models.pixelcnnpp.decoders.rules import not_finite
from art_pixeldefend.models.pixelcnnpp.decoders.snapshot import Snapshot

ITERATED = 64  # images up to which a row is decoded by iteration over all its columns


class FusedOperations(Operations):
    """The operations with one Triton kernel each between the matrix products."""

    def concat_elu(self, x: Tensor, out: Tensor) -> None:
        """``out`` (n, 2 F, N) = elu(x) and elu(-x) along the features; ``x`` may be the first half of ``out``."""
        self.calls.append(partial(kernels.concat_elu, x, out))

    def gate(self, x: Tensor, ab: Tensor, plain: Tensor, active: Tensor) -> None:
        """``plain`` = ``x`` + a sigmoid(b) for (a, b) = ``ab``, ``active`` = its concat_elu."""
        self.calls.append(partial(kernels.gate, x, ab, plain, active))


class Graphs:
    """Functions that are captured as CUDA graphs the first time they run, and replayed from then on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured: dict[object, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def run(self, name: object, function: Callable[[], None]) -> None:
        """Run ``function``, which must do the same whenever it is given under this name."""
        if graph := self._captured.get(name):
            graph.replay()
            return
        function()
        if self._device.type == "cuda":
            self._captured[name] = self._capture(function)

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        return graph


class CapturedDecoder:
    """Decodes up to ``count`` images in memory of its own, with the weights that the model had when it was made.

    Args:
        pixel_cnn: the density model.
        count: images N.
        eps: radius in levels.
    """

    def __init__(self, pixel_cnn: PixelCNNpp, count: int, eps: int) -> None:
        channels, self.height, self.width = pixel_cnn.image_shape
        self.count, self.eps = count, eps
        self._snapshot = Snapshot(pixel_cnn)
        memory = Memory(pixel_cnn.network.head.bias, count)
        self._network = IncrementalNetwork(pixel_cnn, memory, FusedOperations)
        self._x = torch.zeros(self.width, count, channels, dtype=torch.uint8, device=pixel_cnn.device)
        self._levels = torch.zeros_like(self._x)
        self._changed, self._invalid = torch.zeros(2, dtype=torch.int32, device=pixel_cnn.device)
        self._graphs = Graphs(pixel_cnn.device)
        self._lock = Lock()

    def fits(self, pixel_cnn: PixelCNNpp, count: int, eps: int) -> bool:
        """Whether it has the model's current weights, this radius, and memory for ``count`` images but not far more."""
        return eps == self.eps and count <= self.count <= max(2 * count, 8) and self._snapshot.matches(pixel_cnn)

    def decode(self, x: Tensor) -> Tensor:
        """Purify levels ``x`` (N, C, H, W), at most ``count`` images.

        Raises:
            ValueError: if the network's outputs are not finite.
        """
        with self._lock:
            self._network.memory.clear()
            self._invalid.zero_()
            found = x.permute(2, 3, 0, 1).clone(memory_format=torch.contiguous_format)  # (H, W, N, C)
            decode_row = self._decode_row_by_iteration if self.count <= ITERATED else self._decode_row_by_columns
            for row in range(self.height):
                self._x[:, : len(x)] = found[row]
                self._levels.copy_(self._x)
                decode_row(row % CYCLE)
                found[row] = self._levels[:, : len(x)]
            if self._invalid.item():
                raise not_finite()
            return found.permute(2, 3, 0, 1).contiguous()

    def _decode_row_by_columns(self, row: int) -> None:
        self._graphs.run(row, lambda: self._all_columns(row))

    def _decode_row_by_iteration(self, row: int) -> None:
        """Each iteration makes the columns up to the first that changes final (Song et al. 2020, arXiv:2002.03629)."""
        self._graphs.run(("begin", row), lambda: self._begin(row))
        for _ in range(self.width):
            self._graphs.run(row, lambda: self._iterate(row))
            if not self._changed.item():
                break

    def _begin(self, row: int) -> None:
        self._network.begin_row(row)
        self._network.write_levels(row, 0, self._levels)

    def _iterate(self, row: int) -> None:
        self._changed.zero_()
        self._choose(row, 0, self.width)

    def _all_columns(self, row: int) -> None:
        self._network.begin_row(row)
        for column in range(self.width):
            self._choose(row, column, column + 1)

    def _choose(self, row: int, first: int, end: int) -> None:
        outputs = self._network.outputs(row, first, end)
        image = self._network.image[row % PERIOD, first + 1 : end + 1, :-1]
        x, levels = self._x[first:end], self._levels[first:end]
        kernels.choose(outputs, x, levels, image, self._changed, self._invalid, self.eps)
