"""One walk over the pixels of a few images in lock-step, every activation computed once.

When a row begins, all that depends on the rows above is computed for its whole width: the ``u`` stream, and of every
convolution of the ``ul`` stream the taps above, the skip from ``u`` and the biases. Then, pixel by pixel, the taps in
the row itself follow, the head, and the choice of the level. Position (I, J) of a lower resolution falls due at the
pixel (2 I, 2 J) of the one above it.

Addresses and steps are in bytes; those in the tables of a :class:`~.plan.Plan` count from the image's cache or from the
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import carray, njit

from art_pixeldefend.decoding.compiled.head import WINDOW, best_level, components
from art_pixeldefend.decoding.compiled.kernels import SOURCES, VECTOR
from art_pixeldefend.decoding.compiled.plan import FLOAT
from art_pixeldefend.decoding.compiled.vectors import COLUMNS, LANES, call, floats_at
from art_pixeldefend.density.mixture import HALF, LEVELS
from art_pixeldefend.density.network import STAGES

compiled = njit(error_model="numpy", nogil=True, no_cpython_wrapper=True)


class Walk(NamedTuple):
    """What every step needs: where caches and weights are, how many images walk together, sizes."""

    caches: int
    stride: int  # from one image's cache to the next
    images: int
    weights: int
    scratch: int  # in the cache
    filters: int
    narrow: int  # vectors to a row of F sums
    wide: int  # and of 2 F
    plain: int  # bytes to F activations
    active: int  # bytes to their concat_elu
    product: int  # addresses of the kernels
    activate: int
    place: int
    gate: int
    masses: int


@compiled
def begin_rows(walk, bias, x, x_step, matrix, out, out_step, rows, depth, vectors):
    """out = bias + x @ matrix for ``rows`` positions of every image."""
    for image in range(walk.images):
        cache = walk.caches + image * walk.stride
        start, weights = walk.weights + bias, walk.weights + matrix
        call(walk.product, (start, 0, cache + x, x_step, weights, cache + out, out_step, rows, depth, vectors))


@compiled
def add_rows(walk, x, x_step, matrix, out, out_step, rows, depth, vectors):
    """out += x @ matrix for ``rows`` positions of every image."""
    for image in range(walk.images):
        cache = walk.caches + image * walk.stride
        sums, weights = cache + out, walk.weights + matrix
        call(walk.product, (sums, out_step, cache + x, x_step, weights, sums, out_step, rows, depth, vectors))


@compiled
def add_pixel(walk, x, matrix, out, depth, vectors):
    """out += x @ matrix for one position of every image."""
    sums, step = walk.caches + out, walk.stride
    weights = walk.weights + matrix
    call(walk.product, (sums, step, walk.caches + x, step, weights, sums, step, walk.images, depth, vectors))


@compiled
def begin_pixel(walk, bias, x, matrix, out, depth, vectors):
    """out = bias + x @ matrix for one position of every image."""
    start, weights, step = walk.weights + bias, walk.weights + matrix, walk.stride
    call(
        walk.product,
        (start, 0, walk.caches + x, step, weights, walk.caches + out, step, walk.images, depth, vectors),
    )


# A row


@compiled
def u_row_of_layer(walk, layer, nodes, width, slot):
    """The gated resnet of the ``u`` stream, a whole row."""
    f, plain, active = walk.filters, walk.plain, walk.active
    narrow, wide = walk.narrow * VECTOR, walk.wide * VECTOR
    here, above = slot * (width + 2) * active, (1 - slot) * (width + 2) * active
    source, target, sums = nodes[layer.source], nodes[layer.target], walk.scratch
    x, middle = source.u_active, layer.u_middle
    begin_rows(walk, layer.u_bias, x + above, active, layer.u_above, sums, narrow, width, 6 * f, walk.narrow)
    add_rows(walk, x + here, active, layer.u_here, sums, narrow, width, 6 * f, walk.narrow)
    if layer.skip >= 0:
        aside = nodes[layer.skip].u_active + here + active
        add_rows(walk, aside, active, layer.u_skip, sums, narrow, width, 2 * f, walk.narrow)
    for image in range(walk.images):
        cache = walk.caches + image * walk.stride
        call(walk.activate, (cache + sums, narrow, cache + middle + here + active, active, width, f))
    begin_rows(walk, layer.u_out_bias, middle + above, active, layer.u_out_above, sums, wide, width, 6 * f, walk.wide)
    add_rows(walk, middle + here, active, layer.u_out_here, sums, wide, width, 6 * f, walk.wide)
    first = slot * (width + 2) * plain + plain
    for image in range(walk.images):
        cache = walk.caches + image * walk.stride
        old, new, new_active = (
            cache + source.u + first,
            cache + target.u + first,
            cache + target.u_active + here + active,
        )
        call(walk.gate, (cache + sums, wide, old, plain, new, plain, new_active, active, width, f))


@compiled
def ul_row_of_layer(walk, layer, nodes, width, slot):
    """Of the gated resnet of the ``ul`` stream, all sums over what is known as the row begins."""
    f, active = walk.filters, walk.active
    narrow, wide = walk.narrow * VECTOR, walk.wide * VECTOR
    here, above = slot * (width + 2) * active, (1 - slot) * (width + 2) * active
    x, u = nodes[layer.source].ul_active + above, nodes[layer.target].u_active + here + active
    begin_rows(walk, layer.ul_bias, x, active, layer.ul_above, layer.ul_sums, narrow, width, 4 * f, walk.narrow)
    add_rows(walk, u, active, layer.ul_u, layer.ul_sums, narrow, width, 2 * f, walk.narrow)
    middle = layer.ul_middle + above
    begin_rows(
        walk, layer.ul_out_bias, middle, active, layer.ul_out_above, layer.ul_out_sums, wide, width, 4 * f, walk.wide
    )


@compiled
def place_u_row(walk, node, width, slot):
    """Sums in the scratch become a node's row of the ``u`` stream."""
    plain, active = walk.plain, walk.active
    first = slot * (width + 2) + 1
    for image in range(walk.images):
        cache = walk.caches + image * walk.stride
        out, out_active = cache + node.u + first * plain, cache + node.u_active + first * active
        call(
            walk.place,
            (cache + walk.scratch, walk.narrow * VECTOR, out, plain, out_active, active, width, walk.filters),
        )


@compiled
def start_row(walk, model, level, nodes, row):
    """The first convolutions, which read the image itself."""
    narrow, width = walk.narrow * VECTOR, level.width
    pixel = FLOAT * (model.channels + 1)
    depth = 3 * (model.channels + 1)
    above = model.image + row * (width + 2) * pixel  # the image has two rows of zeros on top
    here = above + (width + 2) * pixel
    begin_rows(
        walk, model.start_u_bias, above, pixel, model.start_u_above, walk.scratch, narrow, width, depth, walk.narrow
    )
    add_rows(walk, here, pixel, model.start_u_here, walk.scratch, narrow, width, depth, walk.narrow)
    place_u_row(walk, nodes[level.up_first], width, row % 2)
    begin_rows(
        walk,
        model.start_ul_bias,
        here,
        pixel,
        model.start_ul_above,
        model.start_ul_sums,
        narrow,
        width,
        depth,
        walk.narrow,
    )


@compiled
def shrink_row(walk, finer, level, nodes, row):
    """The strided convolutions, from rows 2 I - 1 and 2 I of the finer level."""
    narrow, plain, f = walk.narrow * VECTOR, walk.plain, walk.filters
    # Row 2 I is in slot 0. Column 2 J - 1 is 2 J columns from the left, where there is a column of zeros.
    above = (finer.width + 2) * plain
    source = nodes[finer.up_last]
    begin_rows(
        walk,
        level.shrink_u_bias,
        source.u + above,
        2 * plain,
        level.shrink_u_above,
        walk.scratch,
        narrow,
        level.width,
        3 * f,
        walk.narrow,
    )
    add_rows(walk, source.u, 2 * plain, level.shrink_u_here, walk.scratch, narrow, level.width, 3 * f, walk.narrow)
    place_u_row(walk, nodes[level.up_first], level.width, row % 2)
    begin_rows(
        walk,
        level.shrink_ul_bias,
        source.ul + above,
        2 * plain,
        level.shrink_ul_above,
        level.shrink_ul_sums,
        narrow,
        level.width,
        2 * f,
        walk.narrow,
    )


@compiled
def grow_row(walk, coarser, level, nodes, row):
    """The transposed convolution of the ``u`` stream, from row ``row // 2`` of the coarser level."""
    narrow, plain, f = walk.narrow * VECTOR, walk.plain, walk.filters
    x = nodes[coarser.down_last].u + (row // 2 % 2) * (coarser.width + 2) * plain + plain
    even = level.grow_u_10 if row % 2 else level.grow_u_00
    odd = level.grow_u_11 if row % 2 else level.grow_u_01
    bias, sums, step = level.grow_u_bias, walk.scratch, 2 * narrow
    begin_rows(walk, bias, x, plain, even, sums, step, (level.width + 1) // 2, f, walk.narrow)
    begin_rows(walk, bias, x, plain, odd, sums + narrow, step, level.width // 2, 2 * f, walk.narrow)
    place_u_row(walk, nodes[level.down_first], level.width, row % 2)


@compiled
def begin_row(walk, model, levels, layers, nodes, row):
    """Everything that the rows above decide, at every level that is due."""
    start_row(walk, model, levels[0], nodes, row)
    due = 0
    for s in range(STAGES):
        if row % (1 << s):
            break
        due, here, level = s, row >> s, levels[s]
        if s:
            shrink_row(walk, levels[s - 1], level, nodes, here)
        for layer in range(level.up, level.up_end):
            u_row_of_layer(walk, layers[layer], nodes, level.width, here % 2)
            ul_row_of_layer(walk, layers[layer], nodes, level.width, here % 2)
    for s in range(due, -1, -1):
        here, level = row >> s, levels[s]
        if s < STAGES - 1:
            grow_row(walk, levels[s + 1], level, nodes, here)
        for layer in range(level.down, level.down_end):
            u_row_of_layer(walk, layers[layer], nodes, level.width, here % 2)
            ul_row_of_layer(walk, layers[layer], nodes, level.width, here % 2)


# A pixel


@compiled
def pixel_of_layer(walk, layer, nodes, width, slot, column):
    """The gated resnet of the ``ul`` stream at one position: the taps to the left and here."""
    f, plain, active, stride = walk.filters, walk.plain, walk.active, walk.stride
    left = (slot * (width + 2) + column) * active
    here = left + active
    source, target = nodes[layer.source], nodes[layer.target]
    sums = layer.ul_sums + column * walk.narrow * VECTOR
    add_pixel(walk, source.ul_active + left, layer.ul_here, sums, 4 * f, walk.narrow)
    if layer.skip >= 0:
        add_pixel(walk, nodes[layer.skip].ul_active + here, layer.ul_skip, sums, 2 * f, walk.narrow)
    call(walk.activate, (walk.caches + sums, stride, walk.caches + layer.ul_middle + here, stride, walk.images, f))
    sums = layer.ul_out_sums + column * walk.wide * VECTOR
    add_pixel(walk, layer.ul_middle + left, layer.ul_out_here, sums, 4 * f, walk.wide)
    plain_here = walk.caches + (slot * (width + 2) + column + 1) * plain
    old, new, new_active = source.ul + plain_here, target.ul + plain_here, target.ul_active + walk.caches + here
    call(walk.gate, (walk.caches + sums, stride, old, stride, new, stride, new_active, stride, walk.images, f))


@compiled
def place_pixel(walk, sums, node, width, slot, column):
    """Sums become a node's position of the ``ul`` stream."""
    position = slot * (width + 2) + column + 1
    out, out_active = node.ul + position * walk.plain, node.ul_active + position * walk.active
    caches, stride = walk.caches, walk.stride
    call(
        walk.place,
        (caches + sums, stride, caches + out, stride, caches + out_active, stride, walk.images, walk.filters),
    )


@compiled
def start_pixel(walk, model, level, nodes, row, column):
    """The first convolution's tap to the left."""
    pixel = FLOAT * (model.channels + 1)
    x = model.image + ((row + 2) * (level.width + 2) + column) * pixel
    sums = model.start_ul_sums + column * walk.narrow * VECTOR
    add_pixel(walk, x, model.start_ul_here, sums, model.channels + 1, walk.narrow)
    place_pixel(walk, sums, nodes[level.up_first], level.width, row % 2, column)


@compiled
def shrink_pixel(walk, finer, level, nodes, row, column):
    """The strided convolution's taps in row 2 I, columns 2 J - 1 and 2 J, of the finer level."""
    sums = level.shrink_ul_sums + column * walk.narrow * VECTOR
    x = nodes[finer.up_last].ul + 2 * column * walk.plain
    add_pixel(walk, x, level.shrink_ul_here, sums, 2 * walk.filters, walk.narrow)
    place_pixel(walk, sums, nodes[level.up_first], level.width, row % 2, column)


@compiled
def grow_pixel(walk, coarser, level, nodes, row, column):
    """The transposed convolution at one position, which reads one position of the coarser level."""
    if row % 2:
        matrix = level.grow_ul_11 if column % 2 else level.grow_ul_10
    else:
        matrix = level.grow_ul_01 if column % 2 else level.grow_ul_00
    position = (row // 2 % 2) * (coarser.width + 2) + column // 2 + 1
    x = nodes[coarser.down_last].ul + position * walk.plain
    begin_pixel(walk, level.grow_ul_bias, x, matrix, walk.scratch, walk.filters, walk.narrow)
    place_pixel(walk, walk.scratch, nodes[level.down_first], level.width, row % 2, column)


@compiled
def parameters_of_pixel(walk, model, levels, layers, nodes, row, column):
    """The network's outputs at a pixel, into every image's cache."""
    start_pixel(walk, model, levels[0], nodes, row, column)
    due = 0
    for s in range(STAGES):
        if (row | column) % (1 << s):
            break
        due, i, j, level = s, row >> s, column >> s, levels[s]
        if s:
            shrink_pixel(walk, levels[s - 1], level, nodes, i, j)
        for layer in range(level.up, level.up_end):
            pixel_of_layer(walk, layers[layer], nodes, level.width, i % 2, j)
    for s in range(due, -1, -1):
        i, j, level = row >> s, column >> s, levels[s]
        if s < STAGES - 1:
            grow_pixel(walk, levels[s + 1], level, nodes, i, j)
        for layer in range(level.down, level.down_end):
            pixel_of_layer(walk, layers[layer], nodes, level.width, i % 2, j)
    level = levels[0]
    position = row % 2 * (level.width + 2) + column + 1
    x = nodes[level.down_last].ul_active + position * walk.active  # its first half is elu(ul)
    begin_pixel(walk, model.head_bias, x, model.head, model.parameters, walk.filters, model.outputs)


def _compile(sources: int) -> Callable:
    """The whole walk; ``sources`` as in the kernels."""

    @njit(error_model="numpy", nogil=True, cache=True)
    def decode(walk, model, levels, layers, nodes, x, eps, purified):
        """Purify levels ``x`` (images, C, H, W) into ``purified``; caches are all zeros but for the channel of ones."""
        _ = sources
        model = model[0]
        channels, mixtures = model.channels, model.mixtures
        height, width = levels[0].height, levels[0].width
        table, mass, pixel = np.empty((mixtures, COLUMNS)), np.empty(WINDOW), np.empty(channels)
        for row in range(height):
            begin_row(walk, model, levels, layers, nodes, row)
            for column in range(width):
                parameters_of_pixel(walk, model, levels, layers, nodes, row, column)
                for image in range(walk.images):
                    cache = walk.caches + image * walk.stride
                    params = carray(floats_at(cache + model.parameters), model.outputs * LANES)
                    position = ((row + 2) * (width + 2) + column + 1) * (channels + 1)
                    values = carray(floats_at(cache + model.image), (height + 2) * (width + 2) * (channels + 1))
                    for k in range(channels):
                        value = np.int64(x[image, k, row, column])
                        low, high = max(value - eps, 0), min(value + eps, LEVELS - 1)
                        components(params, pixel, k, channels, mixtures, table)
                        level = best_level(walk.masses, table, mixtures, low, high, mass)
                        pixel[k] = level
                        purified[image, k, row, column] = level
                        values[position + k] = (level - HALF) / HALF

    return decode


decode = _compile(SOURCES)
