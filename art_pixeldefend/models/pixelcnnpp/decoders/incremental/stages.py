"""The whole network, evaluated row by row and column by column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp, mixture
from art_pixeldefend.models.pixelcnnpp.decoders.incremental.blocks import (
    PERIOD,
    Block,
    Downsample,
    Features,
    Head,
    ResnetPair,
    Start,
    Upsample,
)
from art_pixeldefend.models.pixelcnnpp.decoders.incremental.memory import Memory
from art_pixeldefend.models.pixelcnnpp.decoders.incremental.operations import Operations
from art_pixeldefend.models.pixelcnnpp.network import STAGES, PixelCNNppNetwork, Stream

CYCLE = 2 << (STAGES - 1)  # rows after which the same operations return: two of the lowest resolution


class Stage:
    """Consecutive blocks of one resolution, with the operations recorded for them so far."""

    def __init__(self, blocks: Sequence[Block], new_operations: Callable[[], Operations]) -> None:
        self._blocks, self._new_operations = blocks, new_operations
        self._recorded: dict[tuple[int, ...], Operations] = {}

    def row(self, row: int) -> Operations:
        """The operations that need the rows above only."""
        where = (row % PERIOD,)
        if where not in self._recorded:
            self._recorded[where] = self._new_operations()
            for block in self._blocks:
                block.row(self._recorded[where], *where)
        return self._recorded[where]

    def columns(self, row: int, first: int, end: int) -> Operations:
        """The remaining operations at columns first..end."""
        where = (row % PERIOD, first, end)
        if where not in self._recorded:
            self._recorded[where] = self._new_operations()
            for block in self._blocks:
                block.columns(self._recorded[where], *where)
        return self._recorded[where]


class IncrementalNetwork:
    """The network with its effective weights, and memory for the activations of a batch.

    Args:
        pixel_cnn: the density model.
        memory: where to allocate.
        new_operations: makes the lists that operations are recorded in.
    """

    def __init__(
        self, pixel_cnn: PixelCNNpp, memory: Memory, new_operations: Callable[[], Operations] = Operations
    ) -> None:
        network, (channels, _, width) = pixel_cnn.network, pixel_cnn.image_shape
        self.memory = memory
        self._new_operations, self._filters = new_operations, pixel_cnn.filters
        self._widths = [-(-width // 2**level) for level in range(STAGES)]
        self._ab = [memory.sums(width, 2 * pixel_cnn.filters) for width in self._widths]
        self.image = memory.rows(PERIOD, width + 2, channels + 1)
        features = [[self._new_features(level)] for level in range(STAGES)]
        self._up = [self._way_up(network, level, features) for level in range(STAGES)]
        self._down: list[Stage] = []
        last = features[-1].pop()
        for level in reversed(range(STAGES)):
            stage, last = self._way_down(network, level, features[level], last)
            self._down.insert(0, stage)
        self.head = Head(network, last)

    def _new_features(self, level: int) -> Features:
        return Features(self.memory, self._widths[level], self._filters)

    def _way_up(self, network: PixelCNNppNetwork, level: int, features: list[list[Features]]) -> Stage:
        here, stream = features[level], cast(Stream, network.up[level])
        if level:
            finer = cast(Stream, network.up[level - 1])
            blocks: list[Block] = [Downsample(self.memory, finer, features[level - 1][-1], here[0])]
        else:
            blocks = [Start(self.memory, network, here[0], self.image)]
        for u, ul in stream.pairs():
            here.append(self._new_features(level))
            blocks.append(ResnetPair(self.memory, u, ul, here[-2], here[-1], None, self._ab[level]))
        return Stage(blocks, self._new_operations)

    def _way_down(
        self, network: PixelCNNppNetwork, level: int, skips: list[Features], last: Features
    ) -> tuple[Stage, Features]:
        number = STAGES - 1 - level
        blocks: list[Block] = []
        if number:
            source, last = last, self._new_features(level)
            blocks.append(Upsample(cast(Stream, network.down[number - 1]), source, last))
        for u, ul in cast(Stream, network.down[number]).pairs():
            source, last = last, self._new_features(level)
            blocks.append(ResnetPair(self.memory, u, ul, source, last, skips.pop(), self._ab[level]))
        return Stage(blocks, self._new_operations), last

    def row_operations(self, row: int) -> list[Operations]:
        """Everything that the rows above ``row`` decide, at every resolution that has a position in it."""
        levels = range(_resolutions(row))
        up = [self._up[level].row(row >> level) for level in levels]
        return up + [self._down[level].row(row >> level) for level in reversed(levels)]

    def column_operations(self, row: int, first: int, end: int) -> list[Operations]:
        """The rest of the network at columns first..end of ``row``, without the head."""
        up, down = [], []
        for level in range(_resolutions(row)):
            begin, until = -(-first >> level), -(-end >> level)  # positions of this resolution, if there are any
            if begin < until:
                up.append(self._up[level].columns(row >> level, begin, until))
                down.append(self._down[level].columns(row >> level, begin, until))
        return up + down[::-1]

    def begin_row(self, row: int) -> None:
        """Compute everything that the rows above decide."""
        if row < PERIOD:
            self.image[row, 1:-1, -1] = 1.0
        for operations in self.row_operations(row):
            operations.run()

    def outputs(self, row: int, first: int, end: int) -> Tensor:
        """Compute the network's outputs (n N, P) at columns first..end; the columns before must have been computed.

        Within first..end the outputs depend on the levels last given to :meth:`write_levels`.
        """
        for operations in self.column_operations(row, first, end):
            operations.run()
        inputs, weight = self.head.inputs(row, first, end).transpose(1, 2), self.head.weight.t()
        if len(inputs) == 1:
            return torch.addmm(self.head.bias, inputs[0], weight)
        return torch.matmul(inputs, weight).add_(self.head.bias).flatten(0, 1)

    def write_levels(self, row: int, column: int, levels: Tensor) -> None:
        """Set the image's levels (n, N, C) from a column on."""
        values = (levels.transpose(1, 2).to(self.image.dtype) - mixture.HALF) / mixture.HALF
        self.image[row % PERIOD, column + 1 : column + 1 + len(levels), :-1] = values


def _resolutions(row: int) -> int:
    """How many resolutions have a row at this row of the image."""
    return next((level for level in range(STAGES) if row % 2**level), STAGES)
