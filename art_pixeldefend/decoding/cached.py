"""Every activation computed once, in plain PyTorch, on any device.

When a row begins, all that depends on the rows above is computed for its whole width: the ``u`` stream, and of every
convolution of the ``ul`` stream the taps above, the skip from ``u`` and the biases. Then, pixel by pixel, the taps in
the row itself follow, the head, and the choice of the level. Position (I, J) of a lower resolution falls due at the
pixel (2 I, 2 J) of the one above it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from art_pixeldefend.decoding.rules import Rule
from art_pixeldefend.density import PixelCNNpp, mixture
from art_pixeldefend.density.layers import GatedResnet, WeightNormConv2d
from art_pixeldefend.density.network import STAGES, PixelCNNppNetwork, Stream


@torch.no_grad()
def decode(pixel_cnn: PixelCNNpp, x: Tensor, rule: Rule) -> Tensor:
    """The levels (N, C, H, W) that ``rule`` chooses; of ``x`` only shape and device matter."""
    count, channels, height, width = x.shape
    walk = Walk(pixel_cnn, count)
    found = torch.empty_like(x)
    first = torch.arange(count, device=x.device) * (height * width)
    for row in range(height):
        walk.begin_row(row)
        for column in range(width):
            levels = rule.choose_pixels(walk.pixel(row, column), first + (row * width + column), channels)
            found[:, :, row, column] = levels
            walk.know(row, column, levels)
    return found


class Rows:
    """Two rows of activations (N, 2, W + 2, F), row r in slot r % 2, zeros on either side; and their concat_elu."""

    def __init__(self, like: Tensor, count: int, width: int, filters: int) -> None:
        self.plain = like.new_zeros(count, 2, width + 2, filters)
        self.active = like.new_zeros(count, 2, width + 2, 2 * filters)
        self.filters = filters

    def put(self, slot: int, columns: slice | int, x: Tensor) -> None:
        """Set columns (numbered with the zeros) of a row to ``x``."""
        self.plain[:, slot, columns] = x
        self.activate(slot, columns, x)

    def activate(self, slot: int, columns: slice | int, x: Tensor) -> None:
        """Set columns of a row's concat_elu only: the middle of a resnet needs no more."""
        active = self.active[:, slot, columns]
        active[..., : self.filters] = x
        active[..., self.filters :] = x
        active[..., self.filters :].neg_()
        F.elu_(active)


class Node:
    """A point between two layers: both streams."""

    def __init__(self, like: Tensor, count: int, width: int, filters: int) -> None:
        self.width, self.inner = width, slice(1, width + 1)
        self.u, self.ul = Rows(like, count, width, filters), Rows(like, count, width, filters)


def channels_last(rows: Tensor) -> Tensor:
    """(N, rows, columns, F) as (N, F, rows, columns), where it lies."""
    return rows.permute(0, 3, 1, 2)


def convolve_rows(rows: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """(N, R, columns, F) to (N, columns', F') with a kernel of R rows."""
    y = F.conv2d(channels_last(rows), weight, bias, stride=(1, stride))
    return y[:, :, 0].transpose(1, 2)


class RowConvolution:
    """A convolution of the ``u`` stream, a row at a time."""

    def __init__(self, convolution: WeightNormConv2d) -> None:
        weight = convolution.weight()
        # Slot 0 comes first in memory: in even rows that is the row itself, in odd rows the row above.
        self.weights = [w.contiguous(memory_format=torch.channels_last) for w in (weight.flip(2), weight)]
        self.bias = convolution.bias
        self.stride = convolution.stride

    def row(self, slot: int, x: Tensor) -> Tensor:
        """Its outputs (N, W, F') in the row that is in this slot of ``x`` (N, 2, W + 2, F)."""
        return convolve_rows(x, self.weights[slot], self.bias, self.stride)


class PixelConvolution:
    """A convolution of the ``ul`` stream: what the row above adds, for a whole row; then pixel by pixel the rest."""

    def __init__(self, convolution: WeightNormConv2d) -> None:
        weight = convolution.weight()
        self.above = weight[:, :, :1].contiguous(memory_format=torch.channels_last)
        self.here = weight[:, :, 1].permute(2, 1, 0).flatten(0, 1).contiguous()
        self.bias = convolution.bias
        self.stride = convolution.stride
        self.sums = self.bias

    def begin_row(self, slot: int, x: Tensor, more: Tensor | None = None) -> None:
        """Sums over all that is known as the row begins: ``x`` (N, 2, W + 2, F) above it, and ``more`` (N, W, F')."""
        self.sums = convolve_rows(x[:, 1 - slot : 2 - slot, :-1], self.above, self.bias, self.stride)
        if more is not None:
            self.sums = self.sums + more

    def pixel(self, slot: int, column: int, x: Tensor) -> Tensor:
        """Its outputs (N, F') at a column, whose neighbour to the left and itself are known by now."""
        first = column * self.stride
        return torch.addmm(self.sums[:, column], x[:, slot, first : first + 2].flatten(1), self.here)


class Layer:
    """A pair of gated resnets, from one node to the next."""

    def __init__(self, u: GatedResnet, ul: GatedResnet, source: Node, target: Node, skip: Node | None) -> None:
        self.source, self.target, self.skip = source, target, skip
        self.u_in, self.u_out = RowConvolution(u.conv_in), RowConvolution(u.conv_out)
        self.ul_in, self.ul_out = PixelConvolution(ul.conv_in), PixelConvolution(ul.conv_out)
        self.u_skip = None if u.skip is None else (u.skip.weight().flatten(1), u.skip.bias)
        filters = source.u.filters
        # The second input is (u, -u) on the way up and (u, ul, -u, -ul) on the way down.
        parts = ul.skip.weight().flatten(1).unflatten(1, (2, -1, filters))
        self.aside_u = (parts[:, :, 0].flatten(1), ul.skip.bias)
        self.aside_ul = None if skip is None else parts[:, :, 1].flatten(1).t().contiguous()
        count = len(source.u.plain)
        self.u_middle = Rows(source.u.plain, count, source.width, filters)
        self.ul_middle = Rows(source.u.plain, count, source.width, filters)

    def begin_row(self, slot: int) -> None:
        """The ``u`` stream, and what of the ``ul`` stream is known."""
        inner = self.source.inner
        y = self.u_in.row(slot, self.source.u.active)
        if self.skip is not None:
            y = y + F.linear(self.skip.u.active[:, slot, inner], *self.u_skip)
        self.u_middle.activate(slot, inner, y)
        a, b = self.u_out.row(slot, self.u_middle.active).chunk(2, dim=-1)
        self.target.u.put(slot, inner, torch.addcmul(self.source.u.plain[:, slot, inner], a, b.sigmoid()))
        aside = F.linear(self.target.u.active[:, slot, inner], *self.aside_u)
        self.ul_in.begin_row(slot, self.source.ul.active, aside)
        self.ul_out.begin_row(slot, self.ul_middle.active)

    def pixel(self, slot: int, column: int) -> None:
        """The ``ul`` stream at one position."""
        here = column + 1
        y = self.ul_in.pixel(slot, column, self.source.ul.active)
        if self.skip is not None:
            y = torch.addmm(y, self.skip.ul.active[:, slot, here], self.aside_ul)
        self.ul_middle.activate(slot, here, y)
        a, b = self.ul_out.pixel(slot, column, self.ul_middle.active).chunk(2, dim=-1)
        self.target.ul.put(slot, here, torch.addcmul(self.source.ul.plain[:, slot, here], a, b.sigmoid()))


class Start:
    """The first convolutions, which read the image (N, H + 2, W + 2, C + 1) with its zeros and its channel of ones."""

    def __init__(self, network: PixelCNNppNetwork, target: Node, image: Tensor) -> None:
        self.target, self.image = target, image
        left = network.ul_start_left.weight()
        self.u = (network.u_start.weight(), network.u_start.bias)
        above = network.ul_start_above.weight().clone()
        above[..., 0] += left[:, :, :1, 0]  # both read the pixel above and to the left
        self.above = (above, network.ul_start_above.bias + network.ul_start_left.bias)
        self.left = left[:, :, 1, 0].t().contiguous()
        self.sums = self.left

    def begin_row(self, row: int) -> None:
        """What a row's beginning decides."""
        self.target.u.put(row % 2, self.target.inner, convolve_rows(self.image[:, row : row + 2], *self.u))
        self.sums = convolve_rows(self.image[:, row + 1 : row + 2], *self.above)

    def pixel(self, row: int, column: int) -> None:
        """The ``ul`` stream at one position."""
        y = torch.addmm(self.sums[:, column], self.image[:, row + 2, column], self.left)
        self.target.ul.put(row % 2, column + 1, y)


class Shrink:
    """From a level to the next coarser one."""

    def __init__(self, stream: Stream, source: Node, target: Node) -> None:
        self.source, self.target = source, target
        self.u, self.ul = RowConvolution(stream.resize_u), PixelConvolution(stream.resize_ul)

    def begin_row(self, row: int) -> None:
        """What a row's beginning decides."""
        self.target.u.put(row % 2, self.target.inner, self.u.row(0, self.source.u.plain))  # row 2 I, in slot 0
        self.ul.begin_row(0, self.source.ul.plain)

    def pixel(self, row: int, column: int) -> None:
        """The ``ul`` stream at one position."""
        self.target.ul.put(row % 2, column + 1, self.ul.pixel(0, column, self.source.ul.plain))


class Grow:
    """From a level to the next finer one."""

    def __init__(self, stream: Stream, source: Node, target: Node) -> None:
        self.source, self.target = source, target
        self.u, self.u_bias = stream.resize_u.weight(), stream.resize_u.bias
        self.ul, self.ul_bias = stream.resize_ul.weight().permute(2, 3, 0, 1).contiguous(), stream.resize_ul.bias

    def begin_row(self, row: int) -> None:
        """The ``u`` stream only."""
        x = channels_last(self.source.u.plain[:, row // 2 % 2, None, self.source.inner])
        y = F.conv_transpose2d(x, self.u[:, :, row % 2, None], self.u_bias, stride=(1, 2))
        # Kernels of 3 columns are centred, so their first output column belongs to no pixel.
        y = y[:, :, 0, 1 : self.target.width + 1].transpose(1, 2)
        self.target.u.put(row % 2, self.target.inner, y)

    def pixel(self, row: int, column: int) -> None:
        """The ``ul`` stream at one position."""
        x = self.source.ul.plain[:, row // 2 % 2, column // 2 + 1]
        y = torch.addmm(self.ul_bias, x, self.ul[row % 2, column % 2])
        self.target.ul.put(row % 2, column + 1, y)


class Walk:
    """The network, its weights fused, and the caches of ``count`` images."""

    def __init__(self, pixel_cnn: PixelCNNpp, count: int) -> None:
        network = pixel_cnn.network
        channels, height, width = pixel_cnn.image_shape
        like = network.head.bias
        self.image = like.new_zeros(count, height + 2, width + 2, channels + 1)
        self.image[:, 2:, 1:-1, -1] = 1.0
        self.widths = [-(-width // 2**s) for s in range(STAGES)]
        self._new_node = lambda s: Node(like, count, self.widths[s], pixel_cnn.filters)
        self.up, self.down, self.enter = [], [], []
        nodes = [self._way_up(network, s) for s in range(STAGES)]
        self.last = nodes[-1].pop()
        self.leave: list[Grow | None] = []
        for s in reversed(range(STAGES)):
            self._way_down(network, s, nodes[s])
        self.head = network.head.weight().flatten(1).t().contiguous(), network.head.bias
        self.down.reverse()
        self.leave.reverse()

    def _way_up(self, network: PixelCNNppNetwork, s: int) -> list[Node]:
        nodes = [self._new_node(s)]
        stream = network.up[s]
        if s:
            self.enter.append(Shrink(network.up[s - 1], self.last, nodes[0]))
        else:
            self.enter.append(Start(network, nodes[0], self.image))
        self.up.append([])
        for u, ul in zip(stream.u, stream.ul, strict=True):
            nodes.append(self._new_node(s))
            self.up[-1].append(Layer(u, ul, nodes[-2], nodes[-1], None))
        self.last = nodes[-1]
        return nodes

    def _way_down(self, network: PixelCNNppNetwork, s: int, skips: list[Node]) -> None:
        stage = STAGES - 1 - s
        stream = network.down[stage]
        if stage:
            source, self.last = self.last, self._new_node(s)
            self.leave.append(Grow(network.down[stage - 1], source, self.last))
        else:
            self.leave.append(None)
        self.down.append([])
        for u, ul in zip(stream.u, stream.ul, strict=True):
            source, self.last = self.last, self._new_node(s)
            self.down[-1].append(Layer(u, ul, source, self.last, skips.pop()))

    def begin_row(self, row: int) -> None:
        """Everything that the rows above decide, at every level that is due."""
        due = _levels_due(row)
        for s in range(due):
            self.enter[s].begin_row(row >> s)
            for layer in self.up[s]:
                layer.begin_row((row >> s) % 2)
        for s in reversed(range(due)):
            self._grow_row(s, row >> s)

    def _grow_row(self, s: int, row: int) -> None:
        if self.leave[s] is not None:
            self.leave[s].begin_row(row)
        for layer in self.down[s]:
            layer.begin_row(row % 2)

    def pixel(self, row: int, column: int) -> Tensor:
        """The network's outputs (N, P) at a pixel whose predecessors are known."""
        due = _levels_due(row | column)
        for s in range(due):
            self.enter[s].pixel(row >> s, column >> s)
            for layer in self.up[s]:
                layer.pixel((row >> s) % 2, column >> s)
        for s in reversed(range(due)):
            if self.leave[s] is not None:
                self.leave[s].pixel(row >> s, column >> s)
            for layer in self.down[s]:
                layer.pixel((row >> s) % 2, column >> s)
        weight, bias = self.head
        rows = self.last.ul
        return torch.addmm(bias, rows.active[:, row % 2, column + 1, : rows.filters], weight)

    def know(self, row: int, column: int, levels: Tensor) -> None:
        """Levels (N, C) of a pixel, for those after it."""
        self.image[:, row + 2, column + 1, :-1] = (levels.to(self.image.dtype) - mixture.HALF) / mixture.HALF


def _levels_due(position: int) -> int:
    """How many levels have a position at this row (or row | column) of the image."""
    return next((s for s in range(STAGES) if position % 2**s), STAGES)
