"""Parts of the network: each says what its steps are when a row begins, and at a stretch of columns.

Rows at each resolution count from 0. ``row`` is known modulo :data:`PERIOD`, which is all that the memory of a step
depends on.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp.decoders.cached.rows import Memory, Steps, windows
from art_pixeldefend.models.pixelcnnpp.layers import GatedResnet, WeightNormConv2d
from art_pixeldefend.models.pixelcnnpp.network import PixelCNNppNetwork, Stream

PERIOD = 4  # the image keeps the rows that three rows of outputs read; an even row of every other one has a new source


def matrices(weight: Tensor) -> list[Tensor]:
    """The weights (F', F, rows, columns) of a convolution, a matrix (F', columns F) for each row."""
    return [row.transpose(1, 2).flatten(1) for row in weight.unbind(2)]


def bias_of(convolution: WeightNormConv2d) -> Tensor:
    """Its bias, as sums to begin with."""
    return convolution.bias.view(1, -1, 1)


class Activations:
    """Of one stream at one point between layers, two rows: row r in slot r % 2, a column of zeros on either side."""

    def __init__(self, memory: Memory, width: int, filters: int) -> None:
        self.width = width
        self.plain = memory.rows(2, width + 2, filters)
        self.active = memory.rows(2, width + 2, 2 * filters)

    def activate(self, steps: Steps, slot: int, first: int, end: int) -> None:
        """Columns first..end were written: their concat_elu."""
        here = slice(first + 1, end + 1)
        steps.concat_elu(self.plain[slot, here], self.active[slot, here])


class Node:
    """A point between two layers: both streams."""

    def __init__(self, memory: Memory, width: int, filters: int) -> None:
        self.u, self.ul = (Activations(memory, width, filters) for _ in range(2))
        self.memory, self.width, self.filters = memory, width, filters

    def room(self, features: int) -> Tensor:
        """Zeros (W, features, N), memory for sums."""
        return self.memory.rows(1, self.width, features)[0]


class Part(Protocol):
    """Between two nodes or more."""

    def begin_row(self, steps: Steps, row: int) -> None:
        """Add the steps that the rows above are enough for, for all columns."""

    def stretch(self, steps: Steps, row: int, first: int, end: int) -> None:
        """Add those that are left, at columns first..end."""


class RowConvolution:
    """A convolution of the ``u`` stream, a row at a time."""

    def __init__(self, convolution: WeightNormConv2d) -> None:
        self.above, self.here = matrices(convolution.weight())
        self.bias, self.stride = bias_of(convolution), convolution.stride

    def row(self, steps: Steps, slot: int, x: Tensor, out: Tensor) -> None:
        """Its outputs (W, F', N) in the row that is in this slot of ``x`` (2, W + 2, F, N)."""
        above, here = (windows(row, 0, len(out), 3, self.stride) for row in (x[1 - slot], x[slot]))
        steps.contract(self.bias, self.above, above, out)
        steps.contract(out, self.here, here, out)


class StretchConvolution:
    """A convolution of the ``ul`` stream: what the row above adds, for a whole row; stretch by stretch the rest.

    Args:
        convolution: it.
        sums: memory for what the row above adds, (W, F', N).
    """

    def __init__(self, convolution: WeightNormConv2d, sums: Tensor) -> None:
        self.above, self.here = matrices(convolution.weight())
        self.bias, self.stride = bias_of(convolution), convolution.stride
        self.sums = sums

    def begin_row(self, steps: Steps, slot: int, x: Tensor) -> None:
        """Sums over the row above the one in this slot of ``x`` (2, W + 2, F, N)."""
        steps.contract(self.bias, self.above, windows(x[1 - slot], 0, len(self.sums), 2, self.stride), self.sums)

    def stretch(self, steps: Steps, slot: int, first: int, end: int, x: Tensor, out: Tensor) -> None:
        """Its outputs (n, F', N) at columns first..end, with ``x`` (2, W + 2, F, N) known up to there."""
        here = windows(x[slot], first * self.stride, end - first, 2, self.stride)
        steps.contract(self.sums[first:end], self.here, here, out)


class Layer:
    """A pair of gated resnets, from one node to the next.

    Args:
        u, ul: they.
        source, target, skip: the nodes; a layer on the way down has a skip.
        room: (W, 2 F, N), memory for what is read at once.
    """

    def __init__(
        self, u: GatedResnet, ul: GatedResnet, source: Node, target: Node, skip: Node | None, room: Tensor
    ) -> None:
        self.source, self.target, self.skip, self.room = source, target, skip, room
        filters = source.filters
        self.u_in, self.u_out = RowConvolution(u.conv_in), RowConvolution(u.conv_out)
        self.ul_in = StretchConvolution(ul.conv_in, source.room(filters))
        self.ul_out = StretchConvolution(ul.conv_out, source.room(2 * filters))
        if u.skip is not None:
            self.u_skip = u.skip.weight().flatten(1)
            self.u_in.bias = self.u_in.bias + bias_of(u.skip)
        # The second input is (u, -u) on the way up and (u, ul, -u, -ul) on the way down.
        aside = cast(WeightNormConv2d, ul.skip)
        parts = aside.weight().flatten(1).unflatten(1, (2, -1, filters))
        self.aside_u, self.aside_ul = parts[:, :, 0].flatten(1), parts[:, :, -1].flatten(1)
        self.ul_in.bias = self.ul_in.bias + bias_of(aside)
        self.u_middle, self.ul_middle = (source.memory.rows(2, source.width + 2, 2 * filters) for _ in range(2))

    def begin_row(self, steps: Steps, row: int) -> None:
        """The ``u`` stream, and what of the ``ul`` stream is known."""
        slot = row % 2
        middle = self.u_middle[slot, 1:-1]
        y, _ = middle.chunk(2, dim=1)
        self.u_in.row(steps, slot, self.source.u.active, y)
        if self.skip is not None:
            steps.contract(y, self.u_skip, self.skip.u.active[slot, 1:-1], y)
        steps.concat_elu(y, middle)
        self.u_out.row(steps, slot, self.u_middle, self.room)
        self._gate(steps, self.source.u, self.target.u, slot, 0, len(self.room))
        self.ul_in.begin_row(steps, slot, self.source.ul.active)
        steps.contract(self.ul_in.sums, self.aside_u, self.target.u.active[slot, 1:-1], self.ul_in.sums)
        self.ul_out.begin_row(steps, slot, self.ul_middle)

    def stretch(self, steps: Steps, row: int, first: int, end: int) -> None:
        """The ``ul`` stream at columns first..end."""
        slot = row % 2
        middle = self.ul_middle[slot, first + 1 : end + 1]
        y, _ = middle.chunk(2, dim=1)
        self.ul_in.stretch(steps, slot, first, end, self.source.ul.active, y)
        if self.skip is not None:
            steps.contract(y, self.aside_ul, self.skip.ul.active[slot, first + 1 : end + 1], y)
        steps.concat_elu(y, middle)
        self.ul_out.stretch(steps, slot, first, end, self.ul_middle, self.room[first:end])
        self._gate(steps, self.source.ul, self.target.ul, slot, first, end)

    def _gate(self, steps: Steps, source: Activations, target: Activations, slot: int, first: int, end: int) -> None:
        here = slice(first + 1, end + 1)
        steps.gate(source.plain[slot, here], self.room[first:end], target.plain[slot, here], target.active[slot, here])


class Start:
    """The first convolutions, which read the image with its zeros and its channel of ones.

    Args:
        network: whose they are.
        target: what they write.
        image: (PERIOD, W + 2, C + 1, N), row r in slot r % PERIOD.
    """

    def __init__(self, network: PixelCNNppNetwork, target: Node, image: Tensor) -> None:
        self.target, self.image = target, image
        left = network.ul_start_left.weight()
        self.u, self.u_bias = matrices(network.u_start.weight()), bias_of(network.u_start)
        above = network.ul_start_above.weight().clone()
        above[..., 0] += left[:, :, :1, 0]  # both read the pixel above and to the left
        (self.above,) = matrices(above)
        self.above_bias = bias_of(network.ul_start_above) + bias_of(network.ul_start_left)
        self.left = left[:, :, 1, 0]
        self.sums = target.room(target.filters)

    def begin_row(self, steps: Steps, row: int) -> None:
        """What a row's beginning decides."""
        target, width = self.target.u, self.target.width
        before, above = (windows(self.image[(row - k) % PERIOD], 0, width, 3) for k in (2, 1))
        y = target.plain[row % 2, 1:-1]
        steps.contract(self.u_bias, self.u[0], before, y)
        steps.contract(y, self.u[1], above, y)
        target.activate(steps, row % 2, 0, width)
        steps.contract(self.above_bias, self.above, above, self.sums)

    def stretch(self, steps: Steps, row: int, first: int, end: int) -> None:
        """The ``ul`` stream at columns first..end."""
        target = self.target.ul
        left = self.image[row % PERIOD, first:end]
        steps.contract(self.sums[first:end], self.left, left, target.plain[row % 2, first + 1 : end + 1])
        target.activate(steps, row % 2, first, end)


class Shrink:
    """From a level to the next coarser one. It reads row 2 I, in slot 0, and the one above."""

    def __init__(self, stream: Stream, source: Node, target: Node) -> None:
        self.source, self.target = source, target
        self.u = RowConvolution(cast(WeightNormConv2d, stream.resize_u))
        self.ul = StretchConvolution(cast(WeightNormConv2d, stream.resize_ul), target.room(target.filters))

    def begin_row(self, steps: Steps, row: int) -> None:
        """What a row's beginning decides."""
        target = self.target.u
        self.u.row(steps, 0, self.source.u.plain, target.plain[row % 2, 1:-1])
        target.activate(steps, row % 2, 0, target.width)
        self.ul.begin_row(steps, 0, self.source.ul.plain)

    def stretch(self, steps: Steps, row: int, first: int, end: int) -> None:
        """The ``ul`` stream at columns first..end."""
        target = self.target.ul
        self.ul.stretch(steps, 0, first, end, self.source.ul.plain, target.plain[row % 2, first + 1 : end + 1])
        target.activate(steps, row % 2, first, end)


class Doubling:
    """A transposed convolution of either stream: rows and columns, even and odd, have a matrix each."""

    def __init__(self, convolution: WeightNormConv2d) -> None:
        rows = matrices(convolution.weight().transpose(0, 1))
        self.bias = bias_of(convolution)
        # Kernels of 3 columns are centred: even columns have the middle tap, odd ones the last tap of the position
        # on their left and the first of the one on their right.
        columns = [[1], [2, 0]] if convolution.direction.shape[-1] == 3 else [[0], [1]]
        taps = [row.unflatten(1, (convolution.direction.shape[-1], -1)) for row in rows]
        self.matrices = [[row[:, column].flatten(1) for column in columns] for row in taps]
        self.taps = [len(column) for column in columns]

    def stretch(self, steps: Steps, source: Activations, target: Activations, row: int, first: int, end: int) -> None:
        """Columns first..end of a row of the target."""
        x, y = source.plain[row // 2 % 2], target.plain[row % 2]
        for start in range(first, min(first + 2, end)):
            out = y[start + 1 : end + 1 : 2]
            some = windows(x, start // 2 + 1, len(out), self.taps[start % 2])
            steps.contract(self.bias, self.matrices[row % 2][start % 2], some, out)
        target.activate(steps, row % 2, first, end)


class Grow:
    """From a level to the next finer one."""

    def __init__(self, stream: Stream, source: Node, target: Node) -> None:
        self.source, self.target = source, target
        self.u, self.ul = (Doubling(cast(WeightNormConv2d, c)) for c in (stream.resize_u, stream.resize_ul))

    def begin_row(self, steps: Steps, row: int) -> None:
        """The ``u`` stream only."""
        self.u.stretch(steps, self.source.u, self.target.u, row, 0, self.target.width)

    def stretch(self, steps: Steps, row: int, first: int, end: int) -> None:
        """The ``ul`` stream at columns first..end."""
        self.ul.stretch(steps, self.source.ul, self.target.ul, row, first, end)


class Head:
    """The mixtures' parameters.

    Args:
        network: whose they are.
        source: the last node.
    """

    def __init__(self, network: PixelCNNppNetwork, source: Node) -> None:
        self.source = source.ul
        self.weight, self.bias = network.head.weight().flatten(1).t(), network.head.bias

    def stretch(self, row: int, first: int, end: int) -> Tensor:
        """Of columns first..end, (n N, P)."""
        active = self.source.active[row % 2, first + 1 : end + 1, : len(self.weight)].transpose(1, 2)
        if len(active) == 1:
            return torch.addmm(self.bias, active[0], self.weight)
        return torch.matmul(active, self.weight).add_(self.bias).flatten(0, 1)
