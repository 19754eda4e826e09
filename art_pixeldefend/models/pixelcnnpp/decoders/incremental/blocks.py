"""The network's blocks, evaluated row by row and column by column.

Each block appends its operations to :class:`~.operations.Operations`: ``row`` those that need the rows above only,
``columns`` those that are left at some columns. Rows are numbered per resolution. Row ``r`` of the activations is kept
in slot ``r % 2``, and row ``r`` of the image in slot ``r % PERIOD``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from torch import Tensor

from art_pixeldefend.models.pixelcnnpp.decoders.incremental.memory import Memory, windows
from art_pixeldefend.models.pixelcnnpp.decoders.incremental.operations import Operations
from art_pixeldefend.models.pixelcnnpp.layers import GatedResnet, WeightNormConv2d
from art_pixeldefend.models.pixelcnnpp.network import PixelCNNppNetwork, Stream

# Rows after which a block uses the same memory again. The first convolutions read two rows above the current one, and
# rows 2 r and 2 r + 1 of a resolution are upsampled from row r of the next one, in slot r % 2.
PERIOD = 4


def matrices(weight: Tensor) -> list[Tensor]:
    """The weights (F', F, rows, columns) of a convolution as one matrix (F', columns F) per row of the kernel."""
    return [row.transpose(1, 2).flatten(1) for row in weight.unbind(2)]


def bias_of(convolution: WeightNormConv2d) -> Tensor:
    """The bias of a convolution as sums (1, F', 1) that broadcast over columns and images."""
    return convolution.bias.view(1, -1, 1)


class Activations:
    """Activations of one stream between two layers: two rows, with a column of zeros on either side.

    Attributes:
        plain: (2, W + 2, F, N).
        active: their concat_elu, (2, W + 2, 2 F, N).
        staged: memory for the sums that :meth:`store` makes them from.
    """

    def __init__(self, memory: Memory, width: int, filters: int) -> None:
        self.width = width
        self.plain = memory.rows(2, width + 2, filters)
        self.active = memory.rows(2, width + 2, 2 * filters)
        self.staged = memory.staging(self.plain, filters)

    def store(self, operations: Operations, slot: int, first: int, end: int) -> None:
        """Take over the sums staged for columns first..end."""
        here = slice(first + 1, end + 1)
        operations.store(self.staged[slot, here], self.plain[slot, here], self.active[slot, here])


class Features:
    """Activations of both streams between two layers."""

    def __init__(self, memory: Memory, width: int, filters: int) -> None:
        self.u, self.ul = (Activations(memory, width, filters) for _ in range(2))
        self.width, self.filters = width, filters


class Block(Protocol):
    """A part of the network that reads and writes :class:`Features`."""

    def row(self, operations: Operations, row: int) -> None:
        """Append what the rows above decide, for all columns."""

    def columns(self, operations: Operations, row: int, first: int, end: int) -> None:
        """Append the rest, at columns first..end."""


class AboveConvolution:
    """A convolution of the ``u`` stream, one row at a time."""

    def __init__(self, convolution: WeightNormConv2d) -> None:
        self.above, self.here = matrices(convolution.weight())
        self.bias, self.stride = bias_of(convolution), convolution.stride

    def row(self, operations: Operations, slot: int, x: Tensor, out: Tensor) -> None:
        """Its outputs (W, F', N) for the row in this slot of ``x`` (2, W + 2, F, N)."""
        above, here = (windows(row, 0, len(out), 3, self.stride) for row in (x[1 - slot], x[slot]))
        operations.contract(self.bias, self.above, above, out)
        operations.contract(out, self.here, here, out)


class AboveLeftConvolution:
    """A convolution of the ``ul`` stream: taps in the row above for whole rows, those in the row itself by columns.

    Args:
        convolution: the layer to evaluate.
        sums: memory for the contribution of the row above, (W, F', N).
    """

    def __init__(self, convolution: WeightNormConv2d, sums: Tensor) -> None:
        self.above, self.here = matrices(convolution.weight())
        self.bias, self.stride = bias_of(convolution), convolution.stride
        self.sums = sums

    def row(self, operations: Operations, slot: int, x: Tensor) -> None:
        """Sum over the row above the one in this slot of ``x`` (2, W + 2, F, N)."""
        above = windows(x[1 - slot], 0, len(self.sums), 2, self.stride)
        operations.contract(self.bias, self.above, above, self.sums)

    def columns(self, operations: Operations, slot: int, first: int, end: int, x: Tensor, out: Tensor) -> None:
        """Its outputs (n, F', N) at columns first..end, given ``x`` (2, W + 2, F, N) up to there."""
        here = windows(x[slot], first * self.stride, end - first, 2, self.stride)
        operations.contract(self.sums[first:end], self.here, here, out)


class ResnetPair:
    """The gated resnets of both streams between two layers.

    Args:
        memory: where to allocate.
        u, ul: the gated resnets of the two streams.
        source, target: the features read and written.
        skip: the features of the way up that a layer on the way down reads as well.
        ab: memory for the gates' inputs, (W, 2 F, N).
    """

    def __init__(
        self,
        memory: Memory,
        u: GatedResnet,
        ul: GatedResnet,
        source: Features,
        target: Features,
        skip: Features | None,
        ab: Tensor,
    ) -> None:
        self.source, self.target, self.skip, self.ab = source, target, skip, ab
        width, filters = source.width, source.filters
        self.u_in, self.u_out = AboveConvolution(u.conv_in), AboveConvolution(u.conv_out)
        self.ul_in = AboveLeftConvolution(ul.conv_in, memory.sums(width, filters))
        self.ul_out = AboveLeftConvolution(ul.conv_out, memory.sums(width, 2 * filters))
        if u.skip is not None:
            self.u_skip = u.skip.weight().flatten(1)
            self.u_in.bias = self.u_in.bias + bias_of(u.skip)
        # The second input is (u, -u) on the way up and (u, ul, -u, -ul) on the way down.
        aside = cast(WeightNormConv2d, ul.skip)
        parts = aside.weight().flatten(1).unflatten(1, (2, -1, filters))
        self.aside_u, self.aside_ul = parts[:, :, 0].flatten(1), parts[:, :, -1].flatten(1)
        self.ul_in.bias = self.ul_in.bias + bias_of(aside)
        self.u_middle, self.ul_middle = (memory.rows(2, width + 2, 2 * filters) for _ in range(2))
        self.u_staged, self.ul_staged = (memory.staging(m, filters) for m in (self.u_middle, self.ul_middle))

    def row(self, operations: Operations, row: int) -> None:
        """The ``u`` stream, and the sums of the ``ul`` stream over the row above and over ``u``."""
        slot = row % 2
        middle, y = self.u_middle[slot, 1:-1], self.u_staged[slot, 1:-1]
        self.u_in.row(operations, slot, self.source.u.active, y)
        if self.skip is not None:
            operations.contract(y, self.u_skip, self.skip.u.active[slot, 1:-1], y)
        operations.concat_elu(y, middle)
        self.u_out.row(operations, slot, self.u_middle, self.ab)
        self._gate(operations, self.source.u, self.target.u, slot, 0, len(self.ab))
        self.ul_in.row(operations, slot, self.source.ul.active)
        operations.contract(self.ul_in.sums, self.aside_u, self.target.u.active[slot, 1:-1], self.ul_in.sums)
        self.ul_out.row(operations, slot, self.ul_middle)

    def columns(self, operations: Operations, row: int, first: int, end: int) -> None:
        """The ``ul`` stream at columns first..end."""
        slot, here = row % 2, slice(first + 1, end + 1)
        middle, y = self.ul_middle[slot, here], self.ul_staged[slot, here]
        self.ul_in.columns(operations, slot, first, end, self.source.ul.active, y)
        if self.skip is not None:
            operations.contract(y, self.aside_ul, self.skip.ul.active[slot, here], y)
        operations.concat_elu(y, middle)
        self.ul_out.columns(operations, slot, first, end, self.ul_middle, self.ab[first:end])
        self._gate(operations, self.source.ul, self.target.ul, slot, first, end)

    def _gate(
        self, operations: Operations, source: Activations, target: Activations, slot: int, first: int, end: int
    ) -> None:
        here = slice(first + 1, end + 1)
        plain, active = target.plain[slot, here], target.active[slot, here]
        operations.gate(source.plain[slot, here], self.ab[first:end], plain, active)


class Start:
    """The first convolutions, which read the image and its channel of ones.

    Args:
        memory: where to allocate.
        network: the network they belong to.
        target: the features they write.
        image: (PERIOD, W + 2, C + 1, N).
    """

    def __init__(self, memory: Memory, network: PixelCNNppNetwork, target: Features, image: Tensor) -> None:
        self.target, self.image = target, image
        left = network.ul_start_left.weight()
        self.u, self.u_bias = matrices(network.u_start.weight()), bias_of(network.u_start)
        above = network.ul_start_above.weight().clone()
        above[..., 0] += left[:, :, :1, 0]  # both read the pixel above and to the left
        (self.above,) = matrices(above)
        self.above_bias = bias_of(network.ul_start_above) + bias_of(network.ul_start_left)
        self.left = left[:, :, 1, 0]
        self.sums = memory.sums(target.width, target.filters)

    def row(self, operations: Operations, row: int) -> None:
        """The ``u`` stream, and the sums of the ``ul`` stream over the row above."""
        target, width = self.target.u, self.target.width
        before, above = (windows(self.image[(row - k) % PERIOD], 0, width, 3) for k in (2, 1))
        y = target.staged[row % 2, 1:-1]
        operations.contract(self.u_bias, self.u[0], before, y)
        operations.contract(y, self.u[1], above, y)
        target.store(operations, row % 2, 0, width)
        operations.contract(self.above_bias, self.above, above, self.sums)

    def columns(self, operations: Operations, row: int, first: int, end: int) -> None:
        """The ``ul`` stream at columns first..end."""
        target = self.target.ul
        left = self.image[row % PERIOD, first:end]
        operations.contract(self.sums[first:end], self.left, left, target.staged[row % 2, first + 1 : end + 1])
        target.store(operations, row % 2, first, end)


class Downsample:
    """The strided convolutions to the next lower resolution: row I reads row 2 I, in slot 0, and the one above it."""

    def __init__(self, memory: Memory, stream: Stream, source: Features, target: Features) -> None:
        self.source, self.target = source, target
        self.u = AboveConvolution(cast(WeightNormConv2d, stream.resize_u))
        sums = memory.sums(target.width, target.filters)
        self.ul = AboveLeftConvolution(cast(WeightNormConv2d, stream.resize_ul), sums)

    def row(self, operations: Operations, row: int) -> None:
        """The ``u`` stream, and the sums of the ``ul`` stream over the row above."""
        target = self.target.u
        self.u.row(operations, 0, self.source.u.plain, target.staged[row % 2, 1:-1])
        target.store(operations, row % 2, 0, target.width)
        self.ul.row(operations, 0, self.source.ul.plain)

    def columns(self, operations: Operations, row: int, first: int, end: int) -> None:
        """The ``ul`` stream at columns first..end."""
        target = self.target.ul
        out = target.staged[row % 2, first + 1 : end + 1]
        self.ul.columns(operations, 0, first, end, self.source.ul.plain, out)
        target.store(operations, row % 2, first, end)


class TransposedConvolution:
    """A transposed convolution of either stream, with one matrix for each parity of row and column."""

    def __init__(self, convolution: WeightNormConv2d) -> None:
        rows = matrices(convolution.weight().transpose(0, 1))
        self.bias = bias_of(convolution)
        # Kernels of 3 columns are centred: even columns have the middle tap; odd ones have the last tap of the position
        # on their left and the first tap of the one on their right.
        columns = [[1], [2, 0]] if convolution.direction.shape[-1] == 3 else [[0], [1]]
        taps = [row.unflatten(1, (convolution.direction.shape[-1], -1)) for row in rows]
        self.matrices = [[row[:, column].flatten(1) for column in columns] for row in taps]
        self.taps = [len(column) for column in columns]

    def columns(
        self, operations: Operations, source: Activations, target: Activations, row: int, first: int, end: int
    ) -> None:
        """Columns first..end of a row of ``target``."""
        x, y = source.plain[row // 2 % 2], target.staged[row % 2]
        for start in range(first, min(first + 2, end)):
            out = y[start + 1 : end + 1 : 2]
            fields = windows(x, start // 2 + 1, len(out), self.taps[start % 2])
            operations.contract(self.bias, self.matrices[row % 2][start % 2], fields, out)
        target.store(operations, row % 2, first, end)


class Upsample:
    """The transposed convolutions to the next higher resolution."""

    def __init__(self, stream: Stream, source: Features, target: Features) -> None:
        self.source, self.target = source, target
        layers: Sequence[WeightNormConv2d | None] = (stream.resize_u, stream.resize_ul)
        self.u, self.ul = (TransposedConvolution(cast(WeightNormConv2d, layer)) for layer in layers)

    def row(self, operations: Operations, row: int) -> None:
        """The ``u`` stream."""
        self.u.columns(operations, self.source.u, self.target.u, row, 0, self.target.width)

    def columns(self, operations: Operations, row: int, first: int, end: int) -> None:
        """The ``ul`` stream at columns first..end."""
        self.ul.columns(operations, self.source.ul, self.target.ul, row, first, end)


class Head:
    """The last layer, from the ``ul`` stream to the mixtures' parameters.

    Attributes:
        weight: (P, F).
        bias: (P,).
    """

    def __init__(self, network: PixelCNNppNetwork, source: Features) -> None:
        self.weight, self.bias = network.head.weight().flatten(1), network.head.bias
        self._source = source.ul

    def inputs(self, row: int, first: int, end: int) -> Tensor:
        """elu of the ``ul`` stream at columns first..end, (n, F, N)."""
        return self._source.active[row % 2, first + 1 : end + 1, : self.weight.shape[1]]
