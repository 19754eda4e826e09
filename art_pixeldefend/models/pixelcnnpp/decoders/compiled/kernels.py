"""The inner loops as functions with an address.

The walk calls them through that: compiled into each of its steps, they would be compiled dozens of times over.

Numba keeps what it has compiled on disk, and looks only at the file of the function itself to see whether that is out
of date. So each function that is kept has a number in its closure that changes with every file here: that Numba sees.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from numba import cfunc, types

from art_pixeldefend.models.pixelcnnpp.decoders.compiled import vectors
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.vectors import LANES, ROWS

WIDEST = len(ROWS)  # vectors to a block of sums
VECTOR = 4 * LANES  # bytes

_int = types.int64

SOURCES = crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))


class Kernels(NamedTuple):
    """The kernels, compiled."""

    product: Callable
    activate: Callable
    place: Callable
    gate: Callable
    mixture: Callable
    masses: Callable


def _compile(sources: int) -> Kernels:
    @cfunc(types.void(*[_int] * 12), cache=True)
    def product(start, start_step, x, x_step, matrix, height, above, out, out_step, rows, depth, columns):
        """out = start + x @ matrix[above : above + depth], in blocks of sums that fit the registers.

        The matrix has ``height`` rows; ``columns`` are counted in vectors.
        """
        _ = sources
        while columns > 0:
            width = -(-columns // -(-columns // WIDEST))
            blocks = -(-rows // ROWS[width - 1])
            for block in range(blocks):
                first, last = rows * block // blocks, rows * (block + 1) // blocks
                vectors.block_of_sums(
                    last - first,
                    width,
                    start + first * start_step,
                    start_step,
                    x + first * x_step,
                    x_step,
                    matrix + width * VECTOR * above,
                    out + first * out_step,
                    out_step,
                    depth,
                )
            start += width * VECTOR
            out += width * VECTOR
            matrix += width * VECTOR * height
            columns -= width

    @cfunc(types.void(*[_int] * 6), cache=True)
    def activate(x, x_step, out, out_step, count, filters):
        """out[r] = concat_elu(x[r])."""
        _ = sources
        vectors.activate(x, x_step, out, out_step, count, filters)

    @cfunc(types.void(*[_int] * 8), cache=True)
    def place(x, x_step, plain, plain_step, out, out_step, count, filters):
        """plain[r] = x[r], out[r] = concat_elu(x[r])."""
        _ = sources
        vectors.place(x, x_step, plain, plain_step, out, out_step, count, filters)

    @cfunc(types.void(*[_int] * 10), cache=True)
    def gate(ab, ab_step, x, x_step, plain, plain_step, out, out_step, count, filters):
        """plain[r] = x[r] + a[r] sigmoid(b[r]), out[r] = concat_elu(plain[r])."""
        _ = sources
        vectors.gate(ab, ab_step, x, x_step, plain, plain_step, out, out_step, count, filters)

    @cfunc(types.void(*[_int] * 7), cache=True)
    def mixture(table, params, stride, mixtures, channels, channel, pixel):
        """The components of a channel given the pixel's earlier channels: ``head.components``."""
        _ = sources
        vectors.mixture(table, params, stride, mixtures, channels, channel, pixel)

    @cfunc(types.void(*[_int] * 6), cache=True)
    def masses(mass, table, stride, components, low, count):
        """Probabilities of ``count`` levels from ``low`` on, the ends of 0..255 excepted: ``head.best_level``."""
        _ = sources
        vectors.masses(mass, table, stride, components, low, count)

    return Kernels(product, activate, place, gate, mixture, masses)


KERNELS = _compile(SOURCES)
