"""The network, pixel after pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp, mixture
from art_pixeldefend.models.pixelcnnpp.decoders.cached.parts import PERIOD, Grow, Head, Layer, Node, Part, Shrink, Start
from art_pixeldefend.models.pixelcnnpp.decoders.cached.rows import Memory, Steps
from art_pixeldefend.models.pixelcnnpp.network import STAGES, PixelCNNppNetwork, Stream


class Flight:
    """Parts that follow one another at one resolution, and the steps that they have been asked for."""

    def __init__(self, parts: Sequence[Part], new_steps: Callable[[], Steps]) -> None:
        self._parts, self._new_steps = parts, new_steps
        self._kept: dict[tuple[int, ...], Steps] = {}

    def begin_row(self, row: int) -> None:
        """What the rows above decide."""
        where = (row % PERIOD,)
        if where not in self._kept:
            self._kept[where] = self._new_steps()
            for part in self._parts:
                part.begin_row(self._kept[where], *where)
        self._kept[where].run()

    def stretch(self, row: int, first: int, end: int) -> None:
        """The rest, at columns first..end."""
        where = (row % PERIOD, first, end)
        if where not in self._kept:
            self._kept[where] = self._new_steps()
            for part in self._parts:
                part.stretch(self._kept[where], *where)
        self._kept[where].run()


class Walk:
    """The network, its weights fused, and the caches of ``count`` images.

    Args:
        pixel_cnn: the density model.
        count: images N.
        new_steps: makes what the steps are noted in.
    """

    def __init__(self, pixel_cnn: PixelCNNpp, count: int, new_steps: Callable[[], Steps] = Steps) -> None:
        network, width = pixel_cnn.network, pixel_cnn.image_shape[-1]
        self.memory = Memory(network.head.bias, count)
        self._new_steps = new_steps
        widths = [-(-width // 2**s) for s in range(STAGES)]
        self._new_nodes = [partial(Node, self.memory, width, pixel_cnn.filters) for width in widths]
        self._rooms = [self.memory.rows(1, width, 2 * pixel_cnn.filters)[0] for width in widths]
        self.image = self.memory.rows(PERIOD, width + 2, pixel_cnn.image_shape[0] + 1)
        nodes = [[new_node()] for new_node in self._new_nodes]
        self.up = [self._way_up(network, s, nodes) for s in range(STAGES)]
        self.down: list[Flight] = []
        last = nodes[-1].pop()
        for s in reversed(range(STAGES)):
            flight, last = self._way_down(network, s, nodes[s], last)
            self.down.insert(0, flight)
        self.head = Head(network, last)

    def _way_up(self, network: PixelCNNppNetwork, s: int, nodes: list[list[Node]]) -> Flight:
        here, stream = nodes[s], cast(Stream, network.up[s])
        if s:
            parts: list[Part] = [Shrink(cast(Stream, network.up[s - 1]), nodes[s - 1][-1], here[0])]
        else:
            parts = [Start(network, here[0], self.image)]
        for u, ul in stream.pairs():
            here.append(self._new_nodes[s]())
            parts.append(Layer(u, ul, here[-2], here[-1], None, self._rooms[s]))
        return Flight(parts, self._new_steps)

    def _way_down(self, network: PixelCNNppNetwork, s: int, skips: list[Node], last: Node) -> tuple[Flight, Node]:
        stage = STAGES - 1 - s
        parts: list[Part] = []
        if stage:
            source, last = last, self._new_nodes[s]()
            parts.append(Grow(cast(Stream, network.down[stage - 1]), source, last))
        for u, ul in cast(Stream, network.down[stage]).pairs():
            source, last = last, self._new_nodes[s]()
            parts.append(Layer(u, ul, source, last, skips.pop(), self._rooms[s]))
        return Flight(parts, self._new_steps), last

    def begin_row(self, row: int) -> None:
        """Everything that the rows above decide, at every level that is due."""
        if row < PERIOD:
            self.image[row, 1:-1, -1] = 1.0
        due = _levels_due(row)
        for s in range(due):
            self.up[s].begin_row(row >> s)
        for s in reversed(range(due)):
            self.down[s].begin_row(row >> s)

    def stretch(self, row: int, first: int, end: int) -> Tensor:
        """The network's outputs (n N, P) at columns first..end of a row that is known before them, until the next ones.

        Within the stretch they take what :meth:`know` was last told.
        """
        parts = []  # (row, first, end) at each level that has a position in the stretch
        for s in range(_levels_due(row)):
            if -(-first >> s) < -(-end >> s):
                parts.append((row >> s, -(-first >> s), -(-end >> s)))
        for flight, part in zip(self.up, parts, strict=False):
            flight.stretch(*part)
        for flight, part in reversed(list(zip(self.down, parts, strict=False))):
            flight.stretch(*part)
        return self.head.stretch(row, first, end)

    def know(self, row: int, column: int, levels: Tensor) -> None:
        """Levels (n, N, C) from a column on, for the pixels after them."""
        known = (levels.transpose(1, 2).to(self.image.dtype) - mixture.HALF) / mixture.HALF
        self.image[row % PERIOD, column + 1 : column + 1 + len(levels), :-1] = known


def _levels_due(row: int) -> int:
    """How many levels have a row at this row of the image."""
    return next((s for s in range(STAGES) if row % 2**s), STAGES)
