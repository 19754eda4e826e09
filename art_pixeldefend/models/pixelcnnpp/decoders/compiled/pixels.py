"""What is left to compute when a pixel's predecessors are known: the taps in the row itself, and the head.

Position (I, J) of a lower resolution falls due at the pixel (2 I, 2 J) of the one above it.
"""

from __future__ import annotations

from numba import njit

from art_pixeldefend.models.pixelcnnpp.decoders.compiled.follower import await_left, take_step
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.kernels import VECTOR
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.plan import FLOAT
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.vectors import ask_for, call
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.walk import add_part, add_pixel, begin_pixel
from art_pixeldefend.models.pixelcnnpp.network import STAGES

compiled = njit(error_model="numpy", nogil=True, no_cpython_wrapper=True)


@compiled
def pixel_of_layer(walk, crew, log, layers, number, nodes, level, row, column):
    """The gated resnet of the ``ul`` stream at one position: the taps to the left and here."""
    layer, f, plain, active, stride = layers[number], walk.filters, walk.plain, walk.active, walk.stride
    position = row % 2 * (level.width + 2) + column
    left, here = position * active, (position + 1) * active
    source, target = nodes[layer.source], nodes[layer.target]
    followed = crew.count > 1 and column > 0
    if followed:
        await_left(crew, log, number)
    sums = layer.ul_sums + column * walk.narrow * VECTOR
    out_sums = layer.ul_out_sums + column * walk.wide * VECTOR
    if crew.count > 1:
        ask_for(walk.caches + out_sums, walk.wide)
        if number + 1 < level.up_end or level.down <= number < level.down_end - 1:
            ask_for(walk.caches + layers[number + 1].ul_sums + column * walk.narrow * VECTOR, walk.narrow)
    add_taps(walk, followed, source.ul_active + left, layer.ul_here, sums, walk.narrow)
    if layer.skip >= 0:
        add_pixel(walk, nodes[layer.skip].ul_active + here, layer.ul_skip, sums, 2 * f, walk.narrow)
    call(walk.activate, (walk.caches + sums, stride, walk.caches + layer.ul_middle + here, stride, walk.images, f))
    add_taps(walk, followed, layer.ul_middle + left, layer.ul_out_here, out_sums, walk.wide)
    plain_here = walk.caches + (position + 1) * plain
    old, new, new_active = source.ul + plain_here, target.ul + plain_here, target.ul_active + walk.caches + here
    call(walk.gate, (walk.caches + out_sums, stride, old, stride, new, stride, new_active, stride, walk.images, f))
    if crew.count > 1:
        take_step(crew, log, number)


@compiled
def add_taps(walk, followed, left, matrix, sums, vectors):
    """The tap to the left, if no other member has added it, and the one here."""
    depth = 2 * walk.filters
    if followed:
        add_part(walk, left + walk.active, matrix, 2 * depth, depth, sums, depth, vectors)
    else:
        add_pixel(walk, left, matrix, sums, 2 * depth, vectors)


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
def parameters_of_pixel(walk, crew, log, model, levels, layers, nodes, row, column):
    """The network's outputs at a pixel, into every image's cache."""
    start_pixel(walk, model, levels[0], nodes, row, column)
    due = 0
    for s in range(STAGES):
        if (row | column) % (1 << s):
            break
        due, i, j, level = s, row >> s, column >> s, levels[s]
        if s:
            shrink_pixel(walk, levels[s - 1], level, nodes, i, j)
        for number in range(level.up, level.up_end):
            pixel_of_layer(walk, crew, log, layers, number, nodes, level, i, j)
    for s in range(due, -1, -1):
        i, j, level = row >> s, column >> s, levels[s]
        if s < STAGES - 1:
            grow_pixel(walk, levels[s + 1], level, nodes, i, j)
        for number in range(level.down, level.down_end):
            pixel_of_layer(walk, crew, log, layers, number, nodes, level, i, j)
    level = levels[0]
    position = row % 2 * (level.width + 2) + column + 1
    x = nodes[level.down_last].ul_active + position * walk.active  # its first half is elu(ul)
    begin_pixel(walk, model.head_bias, x, model.head, model.parameters, walk.filters, model.outputs)
