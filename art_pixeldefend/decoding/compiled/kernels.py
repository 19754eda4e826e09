"""The inner loops as functions with an address.

The walk calls them through that: compiled into each of its steps, they would be compiled dozens of times over.
"""

from __future__ import annotations

from numba import cfunc, types

from art_pixeldefend.decoding.compiled import vectors
from art_pixeldefend.decoding.compiled.vectors import LANES, ROWS

WIDEST = len(ROWS)  # vectors to a block of sums
VECTOR = 4 * LANES  # bytes

_int, _float = types.int64, types.float64


@cfunc(types.void(*[_int] * 10), cache=True)
def product(start, start_step, x, x_step, matrix, out, out_step, rows, depth, columns):
    """out = start + x @ matrix, in blocks of sums that fit the registers; ``columns`` are counted in vectors."""
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
                matrix,
                out + first * out_step,
                out_step,
                depth,
            )
        start += width * VECTOR
        out += width * VECTOR
        matrix += width * VECTOR * depth
        columns -= width


@cfunc(types.void(*[_int] * 6), cache=True)
def activate(x, x_step, out, out_step, count, filters):
    """out[r] = concat_elu(x[r])."""
    vectors.activate(x, x_step, out, out_step, count, filters)


@cfunc(types.void(*[_int] * 8), cache=True)
def place(x, x_step, plain, plain_step, out, out_step, count, filters):
    """plain[r] = x[r], out[r] = concat_elu(x[r])."""
    vectors.place(x, x_step, plain, plain_step, out, out_step, count, filters)


@cfunc(types.void(*[_int] * 10), cache=True)
def gate(ab, ab_step, x, x_step, plain, plain_step, out, out_step, count, filters):
    """plain[r] = x[r] + a[r] sigmoid(b[r]), out[r] = concat_elu(plain[r])."""
    vectors.gate(ab, ab_step, x, x_step, plain, plain_step, out, out_step, count, filters)


@cfunc(types.void(_int, _int, _float, _float, _float, _int), cache=True)
def edges(below, above, first, mean, inverse_scale, count):
    """below[e] = sigmoid(t), above[e] = sigmoid(-t) with t = (first + e - mean) inverse_scale."""
    vectors.logistic_edges(below, above, first, mean, inverse_scale, count)
