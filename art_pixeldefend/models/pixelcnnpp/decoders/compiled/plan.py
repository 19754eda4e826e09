"""Where everything lies: the fused weights of a model, and the caches of one image.

Both are flat pieces of memory, addressed in bytes. Feature maps are padded with zeros to a multiple of BLOCK (zero
weights keep them zero), rows of sums to a multiple of LANES.

The cache of an image holds, for every point between two layers (a *node*) and for the middle of every gated resnet, two
rows (the current one and the one above it, row r in slot r % 2) of each stream, with a column of zeros on either side.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.kernels import WIDEST
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.vectors import BLOCK, LANES
from art_pixeldefend.models.pixelcnnpp.layers import GatedResnet, WeightNormConv2d
from art_pixeldefend.models.pixelcnnpp.network import STAGES, PixelCNNppNetwork, Stream

FLOAT = 4  # bytes
ALIGNMENT = 64


def _record(names: str) -> np.dtype:
    return np.dtype([(name, np.int64) for name in names.split()])


# Addresses in the cache: plain activations, and their concat_elu.
NODE = _record("u ul u_active ul_active")

# level is a resolution; source, target and skip are nodes; skip is -1 on the way up. Weights of taps in the row above
# and in this row; caches of the middle of the resnet and of the sums over everything that is known when a row begins.
LAYER = _record(
    "level source target skip"
    " u_above u_here u_skip u_bias u_out_above u_out_here u_out_bias"
    " ul_above ul_u ul_here ul_skip ul_bias ul_out_above ul_out_here ul_out_bias"
    " u_middle ul_middle u_sums u_out_sums ul_sums ul_out_sums"
)

# One resolution: its layers on the way up and down, the nodes where these begin and end; how it is entered, by a
# strided convolution ("shrink") and by a transposed one ("grow", a matrix for each parity of row and column).
LEVEL = _record(
    "height width up up_end down down_end up_first up_last down_first down_last"
    " shrink_u_above shrink_u_here shrink_u_bias shrink_ul_above shrink_ul_here shrink_ul_bias shrink_ul_sums"
    " grow_u_00 grow_u_01 grow_u_10 grow_u_11 grow_u_bias"
    " grow_ul_00 grow_ul_01 grow_ul_10 grow_ul_11 grow_ul_bias"
)

MODEL = _record(
    "channels mixtures filters narrow wide outputs stride scratch parameters image"
    " start_u_above start_u_here start_u_bias start_ul_above start_ul_here start_ul_bias start_ul_sums"
    " head head_bias"
)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class Weights:
    """Matrices as the inner loops read them: panels of at most WIDEST vectors of columns, row after row."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.size = 0

    def _append(self, piece: Tensor) -> int:
        address = self.size
        padding = _round_up(len(piece), ALIGNMENT // FLOAT) - len(piece)
        self.pieces += [piece, piece.new_zeros(padding)]
        self.size += FLOAT * (len(piece) + padding)
        return address

    def matrix(self, matrix: Tensor) -> int:
        """Address of a matrix (inputs, outputs)."""
        left = vectors(matrix.shape[1])
        matrix = torch.nn.functional.pad(matrix, (0, left * LANES - matrix.shape[1]))
        panels, first = [], 0
        while left:
            width = panel(left)
            panels.append(matrix[:, first * LANES : (first + width) * LANES].flatten())
            first, left = first + width, left - width
        return self._append(torch.cat(panels))

    def row(self, row: Tensor) -> int:
        """Address of a bias (outputs,)."""
        return self._append(torch.nn.functional.pad(row, (0, vectors(len(row)) * LANES - len(row))))

    def pack(self) -> np.ndarray:
        """All of it in one piece, of NumPy's making: that asks for large pages, which spares thousands of misses."""
        packed = np.empty(self.size // FLOAT, dtype=np.float32)
        torch.cat(self.pieces, out=torch.from_numpy(packed))
        return packed


def vectors(columns: int) -> int:
    """Vectors to a row of so many sums."""
    return -(-columns // LANES)


def panel(left: int) -> int:
    """Vectors in the next panel of those left: as equal as they can be."""
    return -(-left // -(-left // WIDEST))


class Cache:
    """Hands out addresses in an image's cache."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, floats: int) -> int:
        """Address of room for so many floats."""
        address = self.size
        self.size += _round_up(FLOAT * floats, ALIGNMENT)
        return address


class Plan:
    """A model laid out for the compiled engine: fields as the records above, ``weights`` packed."""

    def __init__(self, pixel_cnn: PixelCNNpp) -> None:
        network = pixel_cnn.network
        self.channels, height, width = pixel_cnn.image_shape
        self.filters = _round_up(pixel_cnn.filters, BLOCK)
        self.real_filters = pixel_cnn.filters
        self._weights, self._cache = Weights(), Cache()
        self._nodes: list[tuple] = []
        self._layers: list[tuple[int, dict[str, int]]] = []
        self._levels = [{"height": -(-height // 2**s), "width": -(-width // 2**s)} for s in range(STAGES)]
        model = self._start(network)
        self._way_up(network)
        self._way_down(network)
        model |= self._head(network, pixel_cnn)
        cache = self._cache
        model["scratch"] = self._sums(0, self.filters)
        self.layers = _table(self._share_sums(), LAYER)
        # An odd number of cache lines between images: the same pixel of several must not compete for one set of lines.
        model["stride"] = cache.size + ALIGNMENT * (1 - cache.size // ALIGNMENT % 2)
        self.weights = self._weights.pack()
        self.model = _table([model], MODEL)
        self.levels = _table(self._levels, LEVEL)
        self.layers_of_crew = _table(self._own_sums(), LAYER)
        self.bytes_of_crew = cache.size
        self.nodes = np.array(self._nodes, dtype=NODE)

    @staticmethod
    def _padded(columns: int) -> int:
        return vectors(columns) * LANES

    # Weights

    def _taps(self, convolution: WeightNormConv2d) -> Tensor:
        """Weights (rows, columns, inputs, outputs), feature maps padded."""
        weight = convolution.weight().float()
        weight = weight.permute(2, 3, 0, 1) if convolution.transposed else weight.permute(2, 3, 1, 0)
        return self._pad(self._pad(weight, 2), 3).contiguous()

    def _pad(self, weight: Tensor, axis: int) -> Tensor:
        """Zeros after each stretch of feature maps along an axis that consists of such stretches."""
        stretches, rest = divmod(weight.shape[axis], self.real_filters)
        if rest or self.filters == self.real_filters:
            return weight
        parts = weight.unflatten(axis, (stretches, self.real_filters)).movedim(axis + 1, -1)
        parts = torch.nn.functional.pad(parts, (0, self.filters - self.real_filters))
        return parts.movedim(-1, axis + 1).flatten(axis, axis + 1)

    def _matrix(self, taps: Tensor) -> int:
        return self._weights.matrix(taps.flatten(0, -2))

    def _bias(self, *convolutions: WeightNormConv2d) -> int:
        return self._weights.row(self._pad(sum(c.bias.float() for c in convolutions), 0))

    # Caches

    def _rows(self, level: int, floats: int) -> int:
        return self._cache.take(2 * (self._levels[level]["width"] + 2) * floats)

    def _sums(self, level: int, columns: int) -> int:
        return self._cache.take(self._levels[level]["width"] * self._padded(columns))

    def _node(self, level: int) -> int:
        f = self.filters
        self._nodes.append(tuple(self._rows(level, floats) for floats in (f, f, 2 * f, 2 * f)))
        return len(self._nodes) - 1

    def _share_sums(self) -> list[dict[str, int]]:
        """The layers, all with one place for the sums of ``u``: layer by layer it is free again."""
        shared = {"u_sums": self._sums(0, self.filters), "u_out_sums": self._sums(0, 2 * self.filters)}
        return [layer | shared for _, layer in self._layers]

    def _own_sums(self) -> list[dict[str, int]]:
        """The layers, each with a place of its own: a crew has these sums ready before the row begins."""
        f = self.filters
        return [
            layer | {"u_sums": self._sums(level, f), "u_out_sums": self._sums(level, 2 * f)}
            for level, layer in self._layers
        ]

    # Layers

    def _start(self, network: PixelCNNppNetwork) -> dict[str, int]:
        width, height = self._levels[0]["width"], self._levels[0]["height"]
        u = self._start_taps(network.u_start)
        left = self._start_taps(network.ul_start_left)
        above = self._start_taps(network.ul_start_above)
        above[0, 0] += left[0, 0]  # both read the pixel above and to the left
        return {
            "image": self._cache.take((height + 2) * (width + 2) * (self.channels + 1)),
            "start_u_above": self._matrix(u[0]),
            "start_u_here": self._matrix(u[1]),
            "start_u_bias": self._bias(network.u_start),
            "start_ul_above": self._matrix(above[0]),
            "start_ul_here": self._matrix(left[1]),
            "start_ul_bias": self._bias(network.ul_start_above, network.ul_start_left),
            "start_ul_sums": self._sums(0, self.filters),
        }

    def _start_taps(self, convolution: WeightNormConv2d) -> Tensor:
        """Like :meth:`_taps`, for inputs that are the image's channels."""
        return self._pad(convolution.weight().float().permute(2, 3, 1, 0), 3).contiguous()

    def _way_up(self, network: PixelCNNppNetwork) -> None:
        for s, stream in enumerate(network.up):
            level = self._levels[s]
            if s:
                level |= self._shrink(network.up[s - 1], s)
            level["up"] = len(self._layers)
            level["up_first"] = node = self._node(s)
            for u, ul in zip(stream.u, stream.ul, strict=True):
                node = self._layer(s, u, ul, node, skip=-1)
            level["up_last"], level["up_end"] = node, len(self._layers)

    def _way_down(self, network: PixelCNNppNetwork) -> None:
        for stage, stream in enumerate(network.down):
            s = STAGES - 1 - stage
            level = self._levels[s]
            skip = level["up_last"]
            level["down"] = len(self._layers)
            if stage:
                level |= self._grow(network.down[stage - 1])
                node = self._node(s)
            else:
                node, skip = skip, skip - 1
            level["down_first"] = node
            for u, ul in zip(stream.u, stream.ul, strict=True):
                node = self._layer(s, u, ul, node, skip)
                skip -= 1
            level["down_last"], level["down_end"] = node, len(self._layers)

    def _layer(self, level: int, u: GatedResnet, ul: GatedResnet, source: int, skip: int) -> int:
        """Append a pair of gated resnets that reads node ``source``; the new node they write."""
        target, f = self._node(level), self.filters
        u_in, u_out, ul_in, ul_out = (self._taps(c) for c in (u.conv_in, u.conv_out, ul.conv_in, ul.conv_out))
        aside = self._taps(ul.skip)[0, 0]  # (u, -u) on the way up, (u, ul, -u, -ul) on the way down
        by_stream = aside.view(2, -1, f, aside.shape[-1])
        layer = {
            "level": level,
            "source": source,
            "target": target,
            "skip": skip,
            "u_above": self._matrix(u_in[0]),
            "u_here": self._matrix(u_in[1]),
            "u_skip": -1 if u.skip is None else self._matrix(self._taps(u.skip)),
            "u_bias": self._bias(*(c for c in (u.conv_in, u.skip) if c is not None)),
            "u_out_above": self._matrix(u_out[0]),
            "u_out_here": self._matrix(u_out[1]),
            "u_out_bias": self._bias(u.conv_out),
            "ul_above": self._matrix(ul_in[0]),
            "ul_u": self._matrix(by_stream[:, 0]),
            "ul_here": self._matrix(ul_in[1]),
            "ul_skip": -1 if skip < 0 else self._matrix(by_stream[:, 1]),
            "ul_bias": self._bias(ul.conv_in, ul.skip),
            "ul_out_above": self._matrix(ul_out[0]),
            "ul_out_here": self._matrix(ul_out[1]),
            "ul_out_bias": self._bias(ul.conv_out),
            "u_middle": self._rows(level, 2 * f),
            "ul_middle": self._rows(level, 2 * f),
            "ul_sums": self._sums(level, f),
            "ul_out_sums": self._sums(level, 2 * f),
        }
        self._layers.append((level, layer))
        return target

    def _shrink(self, stream: Stream, level: int) -> dict[str, int]:
        u, ul = self._taps(stream.resize_u), self._taps(stream.resize_ul)
        return {
            "shrink_u_above": self._matrix(u[0]),
            "shrink_u_here": self._matrix(u[1]),
            "shrink_u_bias": self._bias(stream.resize_u),
            "shrink_ul_above": self._matrix(ul[0]),
            "shrink_ul_here": self._matrix(ul[1]),
            "shrink_ul_bias": self._bias(stream.resize_ul),
            "shrink_ul_sums": self._sums(level, self.filters),
        }

    def _grow(self, stream: Stream) -> dict[str, int]:
        u, ul = self._taps(stream.resize_u), self._taps(stream.resize_ul)
        grow = {"grow_u_bias": self._bias(stream.resize_u), "grow_ul_bias": self._bias(stream.resize_ul)}
        for row in range(2):
            # Kernels of 3 columns are centred: an odd column gets the last tap of its left and the first of its right.
            grow[f"grow_u_{row}0"] = self._matrix(u[row, 1])
            grow[f"grow_u_{row}1"] = self._matrix(u[row, [2, 0]])
            for column in range(2):
                grow[f"grow_ul_{row}{column}"] = self._matrix(ul[row, column])
        return grow

    def _head(self, network: PixelCNNppNetwork, pixel_cnn: PixelCNNpp) -> dict[str, int]:
        weight = network.head.weight().float()[:, :, 0, 0].t()
        outputs = weight.shape[1]
        weight = torch.nn.functional.pad(weight, (0, 0, 0, self.filters - self.real_filters))
        return {
            "channels": self.channels,
            "mixtures": pixel_cnn.mixtures,
            "filters": self.filters,
            "narrow": vectors(self.filters),
            "wide": vectors(2 * self.filters),
            "outputs": vectors(outputs),
            "parameters": self._cache.take(self._padded(outputs)),
            "head": self._weights.matrix(weight.contiguous()),
            "head_bias": self._weights.row(network.head.bias.float()),
        }


def _table(rows: list[dict[str, int]], dtype: np.dtype) -> np.ndarray:
    return np.array([tuple(row.get(name, -1) for name in dtype.names) for row in rows], dtype=dtype)
