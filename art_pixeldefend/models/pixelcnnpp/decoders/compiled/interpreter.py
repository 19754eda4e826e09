"""Executes a program for a group of images in lockstep, which share each weight that is read."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba import boolean, carray, from_dtype, int64, njit, types, uint8

from art_pixeldefend.models.pixelcnnpp import compilation, mixture
from art_pixeldefend.models.pixelcnnpp.decoders.compiled import activations, choice, gemm, instructions
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.activations import concat_elu, gate, store
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.choice import PADDING, best_level, components, make_table
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.gemm import ROWS, VECTOR, WIDEST, block_of_sums
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.instructions import (
    ADD,
    CONCAT_ELU,
    FROM_BIAS,
    INSTRUCTION,
    LAYOUT,
    STORE,
)
from art_pixeldefend.models.pixelcnnpp.mixture import HALF, LEVELS
from art_pixeldefend.models.pixelcnnpp.passes import numba_loops
from art_pixeldefend.models.pixelcnnpp.passes.numba_loops import pointer

# The files with code and constants that are compiled in. Numba's cache on disk looks at the file of the function itself
# only; a checksum of these, in the function's closure, makes it look at all of them.
MODULES = (activations, choice, gemm, instructions, numba_loops, mixture)
SOURCES = [__file__, *(str(module.__file__) for module in MODULES)]


def checksum(paths: list[str]) -> int:
    """A checksum of the contents of files."""
    return zlib.crc32(b"".join(Path(path).read_bytes() for path in paths))


PRODUCT = types.void(*[int64] * 10)


def _compile_product(sources: int) -> Callable:
    @compilation.jit(PRODUCT)
    def product(start, start_step, x, x_step, matrix, out, out_step, rows, depth, vectors):
        """out = start + x @ matrix.

        Args:
            start, x, out: addresses of ``rows`` rows of float32 numbers.
            start_step, x_step, out_step: bytes from one row to the next.
            matrix: address of ``depth`` rows of ``vectors`` vectors, in panels as :func:`~.gemm.panels` divides them.
        """
        _ = sources
        while vectors > 0:
            width = -(-vectors // -(-vectors // WIDEST))
            blocks = -(-rows // ROWS[width - 1])
            for block in range(blocks):
                first, last = rows * block // blocks, rows * (block + 1) // blocks
                block_of_sums(
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
            vectors -= width

    return product


@njit(error_model="numpy", nogil=True)
def execute(product, instructions, first, end, caches, stride, images, weights):
    """Execute the instructions first..end: at each of their columns, or at one position of every image at once."""
    for number in range(first, end):
        i = instructions[number]
        single = i.columns == 1
        rows = images if single else i.columns
        a_step, b_step = (stride, stride) if single else (i.a_step, i.b_step)
        c_step, d_step = (stride, stride) if single else (i.c_step, i.d_step)
        for image in range(1 if single else images):
            cache = caches + image * stride
            if i.kind <= FROM_BIAS:
                start, step = (cache + i.a, a_step) if i.kind == ADD else (weights + i.a, 0)
                matrix, out = weights + i.matrix, cache + i.c
                product(start, step, cache + i.b, b_step, matrix, out, c_step, rows, i.depth, i.vectors)
            elif i.kind == CONCAT_ELU:
                concat_elu(cache + i.a, a_step, cache + i.b, b_step, rows, i.depth)
            elif i.kind == STORE:
                store(cache + i.a, a_step, cache + i.b, b_step, cache + i.c, c_step, rows, i.depth)
            else:
                gate(cache + i.a, a_step, cache + i.b, b_step, cache + i.c, c_step, cache + i.d, d_step, rows, i.depth)


@njit(error_model="numpy", nogil=True)
def all_finite(numbers):
    """Whether no number is NaN or infinite."""
    finite = True
    for number in numbers:
        finite &= abs(number) < np.float32(np.inf)
    return finite


def _compile(sources: int) -> Callable:
    levels, tables = uint8[:, :, :, ::1], (int64[:, ::1], int64[:, :, ::1])
    memory = (int64, from_dtype(LAYOUT)[::1], int64, int64)
    function, instructions = types.FunctionType(PRODUCT), from_dtype(INSTRUCTION)[::1]

    @compilation.jit(boolean(function, instructions, *tables, *memory, levels, int64, levels))
    def decode_group(
        product, instructions, row_bounds, column_bounds, weights, layout, caches, stride, x, eps, purified
    ):
        """Purify levels ``x`` (images, C, H, W) into ``purified``.

        Args:
            product: the compiled function of that name. (A pointer to it spares its compilation into this one.)
            instructions, row_bounds, column_bounds, layout: of the program.
            weights, caches: addresses of the packed weights, and of the zeroed memory of the images.
            stride: bytes from the memory of one image to that of the next.
            x: levels (images, C, H, W).
            eps: radius in levels.
            purified: levels (images, C, H, W), written.

        Returns:
            Whether all outputs of the network were finite; if not, ``purified`` is incomplete.
        """
        _ = sources
        images, channels, height, width = x.shape
        cycle, where = len(row_bounds), layout[0]
        table, masses, pixel = make_table(where.mixtures), np.empty(LEVELS), np.empty(channels)
        for row in range(height):
            image_row = where.image + row % where.period * where.image_row
            if row < where.period:  # the channel of ones, by which zeros of the image differ from the padding
                for image in range(images):
                    values = carray(pointer(caches + image * stride + image_row), (width + 2, channels + 1), np.float32)
                    values[1:-1, channels] = np.float32(1)
            first, end = row_bounds[row % cycle]
            execute(product, instructions, first, end, caches, stride, images, weights)
            for column in range(width):
                first, end = column_bounds[row % cycle, column]
                execute(product, instructions, first, end, caches, stride, images, weights)
                for image in range(images):
                    cache = caches + image * stride
                    values = carray(pointer(cache + image_row), (width + 2, channels + 1), np.float32)
                    params = carray(pointer(cache + where.outputs), where.parameters + PADDING, np.float32)
                    if not all_finite(params[: where.parameters]):
                        return False
                    for k in range(channels):
                        value = np.int64(x[image, k, row, column])
                        low, high = max(value - eps, 0), min(value + eps, LEVELS - 1)
                        components(params, pixel, k, channels, where.mixtures, table)
                        level = best_level(table, where.mixtures, low, high, masses)
                        pixel[k] = level
                        purified[image, k, row, column] = level
                        values[column + 1, k] = (level - HALF) / HALF
        return True

    return decode_group


product = _compile_product(checksum(SOURCES))
decode_group = _compile(checksum(SOURCES))
