"""Every activation computed once, in plain PyTorch, on any device.

When a row begins, all that depends on the rows above is computed for its whole width: the ``u`` stream, and of every
convolution of the ``ul`` stream the taps above, the skip from ``u`` and the biases. Then, stretch by stretch of the
row, the taps in the row itself follow, the head, and the choice of the levels. Position (I, J) of a lower resolution
falls due at the pixel (2 I, 2 J) of the one above it.

A stretch is one pixel where the batch is large. A few images leave PyTorch little to do at a pixel but to call
functions; for them it is the rest of the row, again and again, until its levels stay the same: each time those up to
the first that changed are final (Song et al. 2020, arXiv:2002.03629).

Activations have the shape (columns, feature maps, images), so that the taps of a convolution in one row are one run of
feature maps, and a convolution is a matrix product for each row of its kernel. In memory images come last, next to
each other, which makes long loops of what is done to each feature map; a few images come first, which makes matrices
of a stretch.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from art_pixeldefend.decoding.rules import Rule
from art_pixeldefend.decoding.threads import share_out
from art_pixeldefend.density import PixelCNNpp, mixture
from art_pixeldefend.density.layers import GatedResnet, WeightNormConv2d
from art_pixeldefend.density.network import STAGES, PixelCNNppNetwork, Stream

FEW = 8  # images, of a thread, up to which whole rows are clearly faster than pixels: benchmarks/README.md


def decode(pixel_cnn: PixelCNNpp, x: Tensor, rule: Rule) -> Tensor:
    """The levels (N, C, H, W) that ``rule`` chooses; levels ``x`` are where the search for a stretch's begins."""

    def part(first: int, end: int) -> Tensor:
        with torch.inference_mode():  # a fifth faster than without gradients only, where there are few images
            found = _decode(pixel_cnn, x[first:end], rule, first)
        return found.clone()  # tensors made in that mode cannot be written to outside of it

    return share_out(part, len(x), x.device)


def _decode(pixel_cnn: PixelCNNpp, x: Tensor, rule: Rule, number: int) -> Tensor:
    """Levels of ``x``, whose first image has this number in the batch that the rule knows."""
    count, _, height, width = x.shape
    if not count:
        return x
    walk = Walk(pixel_cnn, count)
    # Rows, columns, images, channels: as the walk has them.
    found = x.permute(2, 3, 0, 1).clone(memory_format=torch.contiguous_format)
    numbers = torch.arange(height * width, device=x.device).view(height, width, 1)
    numbers = numbers + torch.arange(number, number + count, device=x.device) * (height * width)
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


# Rows of activations, and matrix products over them


def make_rows(like: Tensor, rows: int, width: int, features: int, count: int) -> Tensor:
    """Zeros (rows, width, features, images): images first in memory where they are few, and last where they are not."""
    if count <= FEW:
        return like.new_zeros(count, rows, width, features).movedim(0, -1)
    return like.new_zeros(rows, width, features, count)


def windows(row: Tensor, first: int, count: int, taps: int = 1, stride: int = 1) -> Tensor:
    """(W, F, N) to (count, taps F, N): at each position so many neighbouring columns, the first ones from ``first``."""
    column, feature, image = row.stride()
    shape = (count, taps * row.shape[1], row.shape[2])
    return row[first:].as_strided(shape, (stride * column, feature, image))


def contract(sums: Tensor, weight: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """``sums`` (n, F', N), or what expands to it, + ``weight`` (F', F) times ``x`` (n, F, N), laid out like ``x``."""
    if x.stride(1) > 1:
        return torch.baddbmm(sums, weight.expand(len(x), -1, -1), x, out=out)
    y = None if out is None else out.permute(2, 0, 1)
    y = torch.baddbmm(sums.permute(2, 0, 1), x.permute(2, 0, 1), weight.t().expand(x.shape[2], -1, -1), out=y)
    return y.permute(1, 2, 0)


def matrices(weight: Tensor) -> list[Tensor]:
    """The weights (F', F, rows, columns) of a convolution, a matrix (F', columns F) for each row."""
    return [row.transpose(1, 2).flatten(1) for row in weight.unbind(2)]


def bias_of(convolution: WeightNormConv2d) -> Tensor:
    """Its bias, as sums to begin with."""
    return convolution.bias.view(1, -1, 1)


def concat_elu(x: Tensor) -> None:
    """elu(y) and elu(-y), one above the other, in place of ``x`` (n, 2 F, N), whose upper half is y."""
    upper, lower = x.chunk(2, dim=1)
    torch.neg(upper, out=lower)
    F.elu_(x)


class Activations:
    """Of one stream at one point between layers, two rows: row r in slot r % 2, a column of zeros on either side."""

    def __init__(self, like: Tensor, width: int, filters: int, count: int) -> None:
        self.width = width
        self.plain = make_rows(like, 2, width + 2, filters, count)
        self.active = make_rows(like, 2, width + 2, 2 * filters, count)

    def activate(self, slot: int, first: int, end: int) -> None:
        """Columns first..end were written: their concat_elu."""
        active = self.active[slot, first + 1 : end + 1]
        active.chunk(2, dim=1)[0].copy_(self.plain[slot, first + 1 : end + 1])
        concat_elu(active)


class Node:
    """A point between two layers: both streams."""

    def __init__(self, like: Tensor, width: int, filters: int, count: int) -> None:
        self.u, self.ul = (Activations(like, width, filters, count) for _ in range(2))
        self.width = width


class RowConvolution:
    """A convolution of the ``u`` stream, a row at a time."""

    def __init__(self, convolution: WeightNormConv2d) -> None:
        self.above, self.here = matrices(convolution.weight())
        self.bias, self.stride = bias_of(convolution), convolution.stride

    def row(self, slot: int, x: Tensor, width: int, out: Tensor | None = None) -> Tensor:
        """Its outputs (width, F', N) in the row that is in this slot of ``x`` (2, W + 2, F, N)."""
        above, here = (windows(row, 0, width, 3, self.stride) for row in (x[1 - slot], x[slot]))
        y = contract(self.bias, self.above, above, out)
        return contract(y, self.here, here, y)


class StretchConvolution:
    """A convolution of the ``ul`` stream: what the row above adds, for a whole row; stretch by stretch the rest."""

    def __init__(self, convolution: WeightNormConv2d) -> None:
        self.above, self.here = matrices(convolution.weight())
        self.bias, self.stride = bias_of(convolution), convolution.stride
        self.sums = self.bias

    def begin_row(self, slot: int, x: Tensor, width: int) -> None:
        """Sums over the row above the one in this slot of ``x`` (2, W + 2, F, N)."""
        self.sums = contract(self.bias, self.above, windows(x[1 - slot], 0, width, 2, self.stride))

    def stretch(self, slot: int, first: int, end: int, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Its outputs (n, F', N) at columns first..end, with ``x`` (2, W + 2, F, N) known up to there."""
        here = windows(x[slot], first * self.stride, end - first, 2, self.stride)
        return contract(self.sums[first:end], self.here, here, out)


# Parts of the network


class Layer:
    """A pair of gated resnets, from one node to the next."""

    def __init__(self, u: GatedResnet, ul: GatedResnet, source: Node, target: Node, skip: Node | None) -> None:
        self.source, self.target, self.skip = source, target, skip
        self.u_in, self.u_out = RowConvolution(u.conv_in), RowConvolution(u.conv_out)
        self.ul_in, self.ul_out = StretchConvolution(ul.conv_in), StretchConvolution(ul.conv_out)
        _, _, filters, count = source.u.plain.shape
        if u.skip is not None:
            self.u_skip = u.skip.weight().flatten(1)
            self.u_in.bias = self.u_in.bias + bias_of(u.skip)
        # The second input is (u, -u) on the way up and (u, ul, -u, -ul) on the way down.
        aside = cast(WeightNormConv2d, ul.skip)
        parts = aside.weight().flatten(1).unflatten(1, (2, -1, filters))
        self.aside_u, self.aside_ul = parts[:, :, 0].flatten(1), parts[:, :, -1].flatten(1)
        self.ul_in.bias = self.ul_in.bias + bias_of(aside)
        self.u_middle, self.ul_middle = (
            make_rows(source.u.plain, 2, source.width + 2, 2 * filters, count) for _ in range(2)
        )

    def begin_row(self, slot: int) -> None:
        """The ``u`` stream, and what of the ``ul`` stream is known."""
        width = self.source.width
        middle = self.u_middle[slot, 1:-1]
        y, _ = middle.chunk(2, dim=1)
        self.u_in.row(slot, self.source.u.active, width, y)
        if self.skip is not None:
            contract(y, self.u_skip, self.skip.u.active[slot, 1:-1], y)
        concat_elu(middle)
        gate(self.source.u, self.u_out.row(slot, self.u_middle, width), self.target.u, slot, 0, width)
        self.ul_in.begin_row(slot, self.source.ul.active, width)
        contract(self.ul_in.sums, self.aside_u, self.target.u.active[slot, 1:-1], self.ul_in.sums)
        self.ul_out.begin_row(slot, self.ul_middle, width)

    def stretch(self, slot: int, first: int, end: int) -> None:
        """The ``ul`` stream at columns first..end."""
        middle = self.ul_middle[slot, first + 1 : end + 1]
        y, _ = middle.chunk(2, dim=1)
        self.ul_in.stretch(slot, first, end, self.source.ul.active, y)
        if self.skip is not None:
            contract(y, self.aside_ul, self.skip.ul.active[slot, first + 1 : end + 1], y)
        concat_elu(middle)
        ab = self.ul_out.stretch(slot, first, end, self.ul_middle)
        gate(self.source.ul, ab, self.target.ul, slot, first, end)


def gate(source: Activations, ab: Tensor, target: Activations, slot: int, first: int, end: int) -> None:
    """x + a sigmoid(b) at columns first..end, with a and b one above the other."""
    a, b = ab.chunk(2, dim=1)
    here = slice(first + 1, end + 1)
    torch.addcmul(source.plain[slot, here], a, b.sigmoid_(), out=target.plain[slot, here])
    target.activate(slot, first, end)


class Start:
    """The first convolutions, which read the image (H + 2, W + 2, C + 1, N) with its zeros and its channel of ones."""

    def __init__(self, network: PixelCNNppNetwork, target: Node, image: Tensor) -> None:
        self.target, self.image = target, image
        left = network.ul_start_left.weight()
        self.u, self.u_bias = matrices(network.u_start.weight()), bias_of(network.u_start)
        above = network.ul_start_above.weight().clone()
        above[..., 0] += left[:, :, :1, 0]  # both read the pixel above and to the left
        (self.above,) = matrices(above)
        self.above_bias = bias_of(network.ul_start_above) + bias_of(network.ul_start_left)
        self.left = left[:, :, 1, 0]
        self.sums = self.above_bias

    def begin_row(self, row: int) -> None:
        """What a row's beginning decides."""
        target, width = self.target.u, self.target.width
        before, above = (windows(self.image[r], 0, width, 3) for r in (row, row + 1))
        y = contract(self.u_bias, self.u[0], before, target.plain[row % 2, 1:-1])
        contract(y, self.u[1], above, y)
        target.activate(row % 2, 0, width)
        self.sums = contract(self.above_bias, self.above, above)

    def stretch(self, row: int, first: int, end: int) -> None:
        """The ``ul`` stream at columns first..end."""
        target = self.target.ul
        left = self.image[row + 2, first:end]
        contract(self.sums[first:end], self.left, left, target.plain[row % 2, first + 1 : end + 1])
        target.activate(row % 2, first, end)


class Shrink:
    """From a level to the next coarser one."""

    def __init__(self, stream: Stream, source: Node, target: Node) -> None:
        self.source, self.target = source, target
        self.u = RowConvolution(cast(WeightNormConv2d, stream.resize_u))
        self.ul = StretchConvolution(cast(WeightNormConv2d, stream.resize_ul))

    def begin_row(self, row: int) -> None:
        """What a row's beginning decides: it reads row 2 I, in slot 0, and the one above."""
        target, width = self.target.u, self.target.width
        self.u.row(0, self.source.u.plain, width, target.plain[row % 2, 1:-1])
        target.activate(row % 2, 0, width)
        self.ul.begin_row(0, self.source.ul.plain, width)

    def stretch(self, row: int, first: int, end: int) -> None:
        """The ``ul`` stream at columns first..end."""
        target = self.target.ul
        self.ul.stretch(0, first, end, self.source.ul.plain, target.plain[row % 2, first + 1 : end + 1])
        target.activate(row % 2, first, end)


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

    def stretch(self, source: Activations, target: Activations, row: int, first: int, end: int) -> None:
        """Columns first..end of a row of the target."""
        x, y = source.plain[row // 2 % 2], target.plain[row % 2]
        for start in range(first, min(first + 2, end)):
            out = y[start + 1 : end + 1 : 2]
            some = windows(x, start // 2 + 1, len(out), self.taps[start % 2])
            contract(self.bias, self.matrices[row % 2][start % 2], some, out)
        target.activate(row % 2, first, end)


class Grow:
    """From a level to the next finer one."""

    def __init__(self, stream: Stream, source: Node, target: Node) -> None:
        self.source, self.target = source, target
        self.u, self.ul = (Doubling(cast(WeightNormConv2d, c)) for c in (stream.resize_u, stream.resize_ul))

    def begin_row(self, row: int) -> None:
        """The ``u`` stream only."""
        self.u.stretch(self.source.u, self.target.u, row, 0, self.target.width)

    def stretch(self, row: int, first: int, end: int) -> None:
        """The ``ul`` stream at columns first..end."""
        self.ul.stretch(self.source.ul, self.target.ul, row, first, end)


class Walk:
    """The network, its weights fused, and the caches of ``count`` images."""

    def __init__(self, pixel_cnn: PixelCNNpp, count: int) -> None:
        network = pixel_cnn.network
        channels, height, width = pixel_cnn.image_shape
        like = network.head.bias
        self.image = make_rows(like, height + 2, width + 2, channels + 1, count)
        self.image[2:, 1:-1, -1] = 1.0
        # The caches are to go when the walk goes, without waiting for the garbage collector: no reference to it here.
        self._new_node = lambda s: Node(like, -(-width // 2**s), pixel_cnn.filters, count)
        self.up, self.down, self.enter = [], [], []
        nodes = [self._way_up(network, s) for s in range(STAGES)]
        self.last = nodes[-1].pop()
        self.leave: list[Grow | None] = []
        for s in reversed(range(STAGES)):
            self._way_down(network, s, nodes[s])
        self.head = network.head.weight().flatten(1), bias_of(network.head)
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
        active = self.last.ul.active[row % 2, first + 1 : end + 1, : weight.shape[1]]
        return contract(bias, weight, active).transpose(1, 2).flatten(0, 1).contiguous()

    def know(self, row: int, column: int, levels: Tensor) -> None:
        """Levels (n, N, C) from a column on, for the pixels after them."""
        known = (levels.transpose(1, 2).to(self.image.dtype) - mixture.HALF) / mixture.HALF
        self.image[row + 2, column + 1 : column + 1 + len(levels), :-1] = known


def _levels_due(row: int) -> int:
    """How many levels have a row at this row of the image."""
    return next((s for s in range(STAGES) if row % 2**s), STAGES)
