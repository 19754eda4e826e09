"""From a model to a program: the operations of incremental evaluation as tables of instructions for the interpreter.

All addresses are in bytes, relative to the memory of one image or to the packed weights.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.choice import PADDING
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.gemm import LANES, panels
from art_pixeldefend.models.pixelcnnpp.decoders.incremental import (
    CYCLE,
    PERIOD,
    IncrementalNetwork,
    Memory,
    Operations,
)

FLOAT = 4  # bytes
LINE = 64  # bytes of a cache line

# Kinds of operations, with their operands a, b, c, d
ADD = 0  # c = a + b @ matrix
FROM_BIAS = 1  # the same with a bias a, which is among the weights
CONCAT_ELU = 2  # b = concat_elu(a)
STORE = 3  # b = a, c = concat_elu(a)
GATE = 4  # c = a + gate(b), d = concat_elu(c)

# ``depth`` is the number of a product's inputs, or of an activation's feature maps; ``columns`` the number of positions
# that an operation is for, ``a_step`` and the others the bytes from one position to the next.
OPERANDS = ("a", "a_step", "b", "b_step", "c", "c_step", "d", "d_step")
INSTRUCTION = np.dtype([(name, np.int64) for name in ("kind", "columns", *OPERANDS, "matrix", "depth", "vectors")])
# Where an image's levels and the network's outputs are, and how many there are.
LAYOUT = np.dtype([(name, np.int64) for name in ("image", "image_row", "period", "outputs", "parameters", "mixtures")])


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class AddressSpace(Memory):
    """Lays out the memory of one image without allocating it: views of a tensor without data, whose offsets count.

    Rows of sums are padded to whole vectors, which is what products write.
    """

    def __init__(self) -> None:
        self.size = 0
        self._everything = torch.empty(1 << 40, dtype=torch.float32, device="meta")
        self._staging: Tensor | None = None

    def _allocate(self, *shape: int) -> Tensor:
        first, count = self.size, int(np.prod(shape))
        self.size += _round_up(count, LINE // FLOAT)
        return self._everything[first : first + count].view(*shape, 1)

    def rows(self, rows: int, width: int, features: int) -> Tensor:
        """Activations (rows, width, features, 1)."""
        return self._allocate(rows, width, features)

    def sums(self, width: int, features: int) -> Tensor:
        """Results of matrix products, (width, features, 1)."""
        return self._allocate(width, _round_up(features, LANES))[:, :features]

    def staging(self, rows: Tensor, features: int) -> Tensor:
        """Memory of the shape of ``rows``, one for all: sums are stored away before the next ones are computed."""
        slots, width = rows.shape[:2]
        if self._staging is None:
            self._staging = self.sums(width, features)  # the widest comes first
        return self._staging[:width].expand(slots, -1, -1, -1)


class PackedWeights:
    """Matrices and biases as products read them: panels of vectors of columns, row after row."""

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []
        self._addresses: dict[int, tuple[Tensor, int]] = {}  # by id, of tensors that are kept so that ids stay unique
        self._size = 0

    def matrix(self, weight: Tensor) -> int:
        """The address of a matrix (outputs, inputs)."""
        return self._address(weight, weight.t())

    def bias(self, bias: Tensor) -> int:
        """The address of a bias (1, outputs, 1)."""
        return self._address(bias, bias.view(1, -1))

    def _address(self, key: Tensor, rows: Tensor) -> int:
        if id(key) not in self._addresses:
            self._addresses[id(key)] = key, FLOAT * self._size
            vectors = -(-rows.shape[1] // LANES)
            rows = torch.nn.functional.pad(rows.detach(), (0, vectors * LANES - rows.shape[1]))
            widths = [LANES * width for width in panels(vectors)]
            self._pieces += [panel.flatten() for panel in rows.split(widths, dim=1)]
            self._size += rows.numel()
        return self._addresses[id(key)][1]

    def pack(self) -> np.ndarray:
        """All of it in one array. NumPy's allocator asks for large pages, which spares thousands of TLB misses."""
        packed = np.empty(self._size, dtype=np.float32)
        torch.cat(self._pieces, out=torch.from_numpy(packed))
        return packed


class Instructions(Operations):
    """Records operations as rows of :data:`INSTRUCTION`."""

    def __init__(self, weights: PackedWeights) -> None:
        self.rows: list[tuple[int, ...]] = []
        self._weights = weights

    def _append(self, kind: int, operands: list[Tensor], matrix: int, depth: int, vectors: int) -> None:
        places = [FLOAT * int(number) for x in operands for number in (x.storage_offset(), x.stride(0))]
        places += [0] * (8 - len(places))
        self.rows.append((kind, len(operands[-1]), *places, matrix, depth, vectors))

    def contract(self, sums: Tensor, weight: Tensor, x: Tensor, out: Tensor) -> None:
        """``out`` = ``sums`` (or a bias) + ``weight`` times ``x``."""
        vectors = -(-len(weight) // LANES)
        matrix = self._weights.matrix(weight)
        if sums.is_meta:
            self._append(ADD, [sums, x, out], matrix, weight.shape[1], vectors)
        else:
            self._append(FROM_BIAS, [out, x, out], matrix, weight.shape[1], vectors)
            self.rows[-1] = (*self.rows[-1][:2], self._weights.bias(sums), 0, *self.rows[-1][4:])

    def concat_elu(self, x: Tensor, out: Tensor) -> None:
        """``out`` = concat_elu(``x``)."""
        self._append(CONCAT_ELU, [x, out], 0, x.shape[1], 0)

    def store(self, sums: Tensor, plain: Tensor, active: Tensor) -> None:
        """``plain`` = ``sums``, ``active`` = concat_elu(``sums``)."""
        self._append(STORE, [sums, plain, active], 0, sums.shape[1], 0)

    def gate(self, x: Tensor, ab: Tensor, plain: Tensor, active: Tensor) -> None:
        """``plain`` = ``x`` + a sigmoid(b) for (a, b) = ``ab``, ``active`` = its concat_elu."""
        self._append(GATE, [x, ab, plain, active], 0, x.shape[1], 0)


class Program:
    """Instructions, packed weights and layout of a model.

    Attributes:
        instructions: (count,) of :data:`INSTRUCTION`.
        row_bounds: first and end instruction when a row begins, by row % CYCLE: (CYCLE, 2).
        column_bounds: the same for each column, (CYCLE, W, 2).
        weights: float32.
        layout: (1,) of :data:`LAYOUT`.
        stride: bytes from the memory of one image to that of the next.
    """

    def __init__(self, pixel_cnn: PixelCNNpp) -> None:
        _, height, width = pixel_cnn.image_shape
        weights, memory = PackedWeights(), AddressSpace()
        network = IncrementalNetwork(pixel_cnn, memory, lambda: Instructions(weights))
        head = network.head
        bias = head.bias.view(1, -1, 1)
        outputs = memory.sums(1, len(head.bias) + PADDING)[:, : len(head.bias)]
        rows: list[tuple[int, ...]] = []

        def extend(operations: list[Operations]) -> tuple[int, int]:
            first = len(rows)
            for recorded in cast(list[Instructions], operations):
                rows.extend(recorded.rows)
            return first, len(rows)

        self.row_bounds = np.zeros((CYCLE, 2), dtype=np.int64)
        self.column_bounds = np.zeros((CYCLE, width, 2), dtype=np.int64)
        for row in range(min(CYCLE, height)):
            self.row_bounds[row] = extend(network.row_operations(row))
            for column in range(width):
                last = Instructions(weights)
                last.contract(bias, head.weight, head.inputs(row, column, column + 1), outputs)
                operations = network.column_operations(row, column, column + 1)
                self.column_bounds[row, column] = extend([*operations, last])
        self.instructions = np.array(rows, dtype=INSTRUCTION)
        self.weights = weights.pack()
        # An odd number of cache lines between images: the same pixel of several must not compete for the same sets.
        lines = FLOAT * memory.size // LINE
        self.stride = LINE * (lines + 1 - lines % 2)
        image = network.image
        where = FLOAT * image.storage_offset(), FLOAT * image.stride(0), PERIOD, FLOAT * outputs.storage_offset()
        self.layout = np.array([(*where, len(head.bias), pixel_cnn.mixtures)], dtype=LAYOUT)
