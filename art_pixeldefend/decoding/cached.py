"""Every activation computed once, in plain PyTorch, on any device.

When a row begins, all that depends on the rows above is computed for its whole width: the ``u`` stream, and of every
convolution of the ``ul`` stream the taps above, the skip from ``u`` and the biases. Then, stretch by stretch of the
row, the taps in the row itself follow, the head, and the choice of the levels. Position (I, J) of a lower resolution
falls due at the pixel (2 I, 2 J) of the one above it.

A stretch is one pixel where the batch is large. A few images leave PyTorch little to do at a pixel but to call
functions; for them it is the rest of the row, again and again, until its levels stay the same: each time those up to
the first that changed are final (Song et al. 2020, arXiv:2002.03629).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from art_pixeldefend.decoding.rules import Rule
from art_pixeldefend.density import PixelCNNpp, mixture
from art_pixeldefend.density.layers import GatedResnet, WeightNormConv2d
from art_pixeldefend.density.network import STAGES, PixelCNNppNetwork, Stream

FEW = 4  # images up to which whole rows are clearly faster than pixels: benchmarks/README.md


def decode(pixel_cnn: PixelCNNpp, x: Tensor, rule: Rule) -> Tensor:
    """The levels (N, C, H, W) that ``rule`` chooses; levels ``x`` are where the search for a stretch's begins."""
    with torch.inference_mode():  # a fifth faster than without gradients only, where there are few images
        found = _decode(pixel_cnn, x, rule)
    return found.clone()  # tensors made in that mode cannot be written to outside of it


def _decode(pixel_cnn: PixelCNNpp, x: Tensor, rule: Rule) -> Tensor:
    count, _, height, width = x.shape
    walk = Walk(pixel_cnn, count)
    # Rows, columns, images, channels: as the walk has them.
    found = x.permute(2, 3, 0, 1).clone(memory_format=torch.contiguous_format)
    numbers = torch.arange(height * width, device=x.device).view(height, width, 1)
    numbers = numbers + torch.arange(count, device=x.device) * (height * width)
    step = stretch_of(count, width)
    for row in range(height):
        walk.begin_row(row)
        for start in range(0, width, step):
            _settle(walk, rule, found[row], numbers[row], row, start, min(start + step, width))
    return found.permute(2, 3, 0, 1).contiguous()


def stretch_of(count: int, width: int) -> int:
    """Columns to a stretch for so many images."""
    return width if count <= FEW else 1


def _settle(walk: Walk, rule: Rule, found: Tensor, numbers: Tensor, row: int, first: int, end: int) -> None:
    """Find the levels ``found`` (W, N, C) of columns first..end of a row."""
    count, channels = found.shape[1:]
    if end - first > 1:
        walk.know(row, first, found[first:end])
    while first < end:
        params = walk.stretch(row, first, end)
        levels = rule.choose_pixels(params, numbers[first:end].flatten(), channels).view(end - first, count, channels)
        changed = (levels != found[first:end]).flatten(1).any(dim=1).nonzero() if end - first > 1 else ()
        found[first:end] = levels
        walk.know(row, first, levels)
        first = first + int(changed[0]) + 1 if len(changed) else end


class Rows:
    """Of the ``u`` stream, two rows (N, 2, W + 2, F), row r in slot r % 2, zeros on either side; their concat_elu."""

    def __init__(self, like: Tensor, count: int, width: int, filters: int) -> None:
        self.plain = like.new_zeros(count, 2, width + 2, filters)
        self.active = like.new_zeros(count, 2, width + 2, 2 * filters)
        self.filters = filters

    def put(self, slot: int, x: Tensor) -> None:
        """Set a row to ``x`` (N, W, F)."""
        self.plain[:, slot, 1:-1] = x
        self.activate(slot, x)

    def activate(self, slot: int, x: Tensor) -> None:
        """Set a row's concat_elu only: the middle of a resnet needs no more."""
        concat_elu(x, self.active[:, slot, 1:-1])


class Columns:
    """Of the ``ul`` stream, two rows (2, W + 2, N, F): a stretch of columns is one piece of memory."""

    def __init__(self, like: Tensor, count: int, width: int, filters: int) -> None:
        self.plain = like.new_zeros(2, width + 2, count, filters)
        self.active = like.new_zeros(2, width + 2, count, 2 * filters)

    def activate(self, slot: int, first: int, end: int, x: Tensor) -> None:
        """Set the concat_elu of columns first..end to that of ``x`` (n N, F)."""
        concat_elu(x, self.active[slot, first + 1 : end + 1].flatten(0, 1))

    def put(self, slot: int, first: int, end: int, x: Tensor) -> None:
        """Set columns first..end to ``x`` (n N, F)."""
        self.plain[slot, first + 1 : end + 1].flatten(0, 1).copy_(x)
        self.activate(slot, first, end, x)


def concat_elu(x: Tensor, out: Tensor) -> None:
    """elu(x) and elu(-x), side by side in the last axis of ``out``."""
    filters = x.shape[-1]
    out[..., :filters] = x
    torch.neg(x, out=out[..., filters:])
    F.elu_(out)


class Node:
    """A point between two layers: both streams."""

    def __init__(self, like: Tensor, count: int, width: int, filters: int) -> None:
        self.width = width
        self.u, self.ul = Rows(like, count, width, filters), Columns(like, count, width, filters)


def convolve_rows(rows: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """(N, R, columns, F) to (N, columns', F') with a kernel of R rows."""
    y = F.conv2d(rows.permute(0, 3, 1, 2), weight, bias, stride=(1, stride))
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


class StretchConvolution:
    """A convolution of the ``ul`` stream: what the row above adds, for a whole row; stretch by stretch the rest."""

    def __init__(self, convolution: WeightNormConv2d) -> None:
        taps = convolution.weight().permute(2, 3, 1, 0).contiguous()
        (self.above_left, self.above), (self.left, self.here) = taps
        self.bias = convolution.bias
        self.stride = convolution.stride
        self.sums = self.bias

    def begin_row(self, slot: int, x: Tensor, more: Tensor | None = None) -> None:
        """Sums over all that is known as the row begins: ``x`` (2, W + 2, N, F) above it, and ``more`` (W, N, F')."""
        above = x[1 - slot]
        width = (len(above) - 3) // self.stride + 1
        left, here = self._taps(above, 0, width)
        sums = torch.addmm(self.bias, left, self.above_left).addmm_(here, self.above)
        sums = sums.view(width, -1, sums.shape[-1])
        self.sums = sums if more is None else sums.add_(more)

    def stretch(self, slot: int, first: int, end: int, x: Tensor) -> Tensor:
        """Its outputs (n N, F') at columns first..end, with ``x`` (2, W + 2, N, F) known up to there."""
        left, here = self._taps(x[slot], first, end)
        return torch.addmm(self.sums[first:end].flatten(0, 1), left, self.left).addmm_(here, self.here)

    def _taps(self, x: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
        """What columns first..end read of a row (W + 2, N, F): (n N, F) for each of two taps."""
        first, end, step = first * self.stride, end * self.stride, self.stride
        return x[first:end:step].flatten(0, 1), x[first + 1 : end + 1 : step].flatten(0, 1)


class Layer:
    """A pair of gated resnets, from one node to the next."""

    def __init__(self, u: GatedResnet, ul: GatedResnet, source: Node, target: Node, skip: Node | None) -> None:
        self.source, self.target, self.skip = source, target, skip
        self.u_in, self.u_out = RowConvolution(u.conv_in), RowConvolution(u.conv_out)
        self.ul_in, self.ul_out = StretchConvolution(ul.conv_in), StretchConvolution(ul.conv_out)
        self.u_skip = None if u.skip is None else (u.skip.weight().flatten(1), u.skip.bias)
        filters = source.u.filters
        # The second input is (u, -u) on the way up and (u, ul, -u, -ul) on the way down.
        parts = ul.skip.weight().flatten(1).unflatten(1, (2, -1, filters))
        self.aside_u = (parts[:, :, 0].flatten(1), ul.skip.bias)
        self.aside_ul = None if skip is None else parts[:, :, 1].flatten(1).t().contiguous()
        count = len(source.u.plain)
        self.u_middle = Rows(source.u.plain, count, source.width, filters)
        self.ul_middle = Columns(source.u.plain, count, source.width, filters)

    def begin_row(self, slot: int) -> None:
        """The ``u`` stream, and what of the ``ul`` stream is known."""
        y = self.u_in.row(slot, self.source.u.active)
        if self.skip is not None:
            y = y + F.linear(self.skip.u.active[:, slot, 1:-1], *self.u_skip)
        self.u_middle.activate(slot, y)
        y = gated(self.source.u.plain[:, slot, 1:-1], self.u_out.row(slot, self.u_middle.active))
        self.target.u.put(slot, y)
        aside = F.linear(self.target.u.active[:, slot, 1:-1], *self.aside_u).transpose(0, 1)
        self.ul_in.begin_row(slot, self.source.ul.active, aside)
        self.ul_out.begin_row(slot, self.ul_middle.active)

    def stretch(self, slot: int, first: int, end: int) -> None:
        """The ``ul`` stream at columns first..end."""
        y = self.ul_in.stretch(slot, first, end, self.source.ul.active)
        if self.skip is not None:
            y.addmm_(self.skip.ul.active[slot, first + 1 : end + 1].flatten(0, 1), self.aside_ul)
        self.ul_middle.activate(slot, first, end, y)
        y = self.ul_out.stretch(slot, first, end, self.ul_middle.active)
        x = self.source.ul.plain[slot, first + 1 : end + 1].flatten(0, 1)
        self.target.ul.put(slot, first, end, gated(x, y))


def gated(x: Tensor, y: Tensor) -> Tensor:
    """x + a sigmoid(b), with ``y`` = (a, b)."""
    a, b = y.chunk(2, dim=-1)
    return torch.addcmul(x, a, b.sigmoid())


class Start:
    """The first convolutions, which read the image (H + 2, W + 2, N, C + 1) with its zeros and its channel of ones."""

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
        above, here = (self.image[r : r + n].permute(2, 0, 1, 3) for r, n in ((row, 2), (row + 1, 1)))
        self.target.u.put(row % 2, convolve_rows(above, *self.u))
        self.sums = convolve_rows(here, *self.above).transpose(0, 1).contiguous()

    def stretch(self, row: int, first: int, end: int) -> None:
        """The ``ul`` stream at columns first..end."""
        left = self.image[row + 2, first:end].flatten(0, 1)
        self.target.ul.put(row % 2, first, end, torch.addmm(self.sums[first:end].flatten(0, 1), left, self.left))


class Shrink:
    """From a level to the next coarser one."""

    def __init__(self, stream: Stream, source: Node, target: Node) -> None:
        self.source, self.target = source, target
        self.u, self.ul = RowConvolution(stream.resize_u), StretchConvolution(stream.resize_ul)

    def begin_row(self, row: int) -> None:
        """What a row's beginning decides."""
        self.target.u.put(row % 2, self.u.row(0, self.source.u.plain))  # row 2 I, in slot 0
        self.ul.begin_row(0, self.source.ul.plain)

    def stretch(self, row: int, first: int, end: int) -> None:
        """The ``ul`` stream at columns first..end."""
        self.target.ul.put(row % 2, first, end, self.ul.stretch(0, first, end, self.source.ul.plain))


class Grow:
    """From a level to the next finer one."""

    def __init__(self, stream: Stream, source: Node, target: Node) -> None:
        self.source, self.target = source, target
        self.u, self.u_bias = stream.resize_u.weight(), stream.resize_u.bias
        self.ul, self.ul_bias = stream.resize_ul.weight().permute(2, 3, 0, 1).contiguous(), stream.resize_ul.bias

    def begin_row(self, row: int) -> None:
        """The ``u`` stream only."""
        x = self.source.u.plain[:, row // 2 % 2, None, 1:-1].permute(0, 3, 1, 2)
        y = F.conv_transpose2d(x, self.u[:, :, row % 2, None], self.u_bias, stride=(1, 2))
        # Kernels of 3 columns are centred, so their first output column belongs to no pixel.
        self.target.u.put(row % 2, y[:, :, 0, 1 : self.target.width + 1].transpose(1, 2))

    def stretch(self, row: int, first: int, end: int) -> None:
        """The ``ul`` stream at columns first..end: even and odd ones have a matrix each."""
        x = self.source.ul.plain[row // 2 % 2]
        for start in range(first, min(first + 2, end)):
            columns = x[start // 2 + 1 : (end + 1 - start % 2) // 2 + 1].flatten(0, 1)
            y = torch.addmm(self.ul_bias, columns, self.ul[row % 2, start % 2])
            if end - first == 1:
                self.target.ul.put(row % 2, first, end, y)
            else:
                plain = self.target.ul.plain[row % 2, start + 1 : end + 1 : 2]
                plain.copy_(y.view_as(plain))
        if end - first > 1:
            self.target.ul.activate(
                row % 2, first, end, self.target.ul.plain[row % 2, first + 1 : end + 1].flatten(0, 1)
            )


class Walk:
    """The network, its weights fused, and the caches of ``count`` images."""

    def __init__(self, pixel_cnn: PixelCNNpp, count: int) -> None:
        network = pixel_cnn.network
        channels, height, width = pixel_cnn.image_shape
        like = network.head.bias
        self.image = like.new_zeros(height + 2, width + 2, count, channels + 1)
        self.image[2:, 1:-1, :, -1] = 1.0
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

    def stretch(self, row: int, first: int, end: int) -> Tensor:
        """The network's outputs (n N, P) at columns first..end of a row that is known before them.

        Within the stretch they take what :meth:`know` was last told.
        """
        parts = []  # (slot or row, first, end) at each level that has a position in the stretch
        for s in range(_levels_due(row)):
            if -(-first >> s) < -(-end >> s):
                parts.append((row >> s, -(-first >> s), -(-end >> s)))
        for (here, *columns), enter, layers in zip(parts, self.enter, self.up, strict=False):
            enter.stretch(here, *columns)
            for layer in layers:
                layer.stretch(here % 2, *columns)
        for s in reversed(range(len(parts))):
            here, *columns = parts[s]
            if self.leave[s] is not None:
                self.leave[s].stretch(here, *columns)
            for layer in self.down[s]:
                layer.stretch(here % 2, *columns)
        weight, bias = self.head
        active = self.last.ul.active[row % 2, first + 1 : end + 1, :, : len(weight)]
        return torch.addmm(bias, active.flatten(0, 1), weight)

    def know(self, row: int, column: int, levels: Tensor) -> None:
        """Levels (n, N, C) from a column on, for the pixels after them."""
        known = (levels.to(self.image.dtype) - mixture.HALF) / mixture.HALF
        self.image[row + 2, column + 1 : column + 1 + len(levels), :, :-1] = known


def _levels_due(row: int) -> int:
    """How many levels have a row at this row of the image."""
    return next((s for s in range(STAGES) if row % 2**s), STAGES)
