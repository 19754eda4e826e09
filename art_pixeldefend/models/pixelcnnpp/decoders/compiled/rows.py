"""What is computed when a row begins: all that depends on the rows above, for its whole width.

That is the ``u`` stream, and of every convolution of the ``ul`` stream the taps above, the skip from ``u`` and the
biases. Row i of a lower resolution falls due at row 2 i of the one above it.

Of these, the sums over the row above need nothing of the row itself. A walker without company computes them layer by
layer as they are called for; a crew has them ready before the row begins.
"""

from __future__ import annotations

from numba import njit

from art_pixeldefend.models.pixelcnnpp.decoders.compiled.crew import meet, share
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.kernels import VECTOR
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.plan import FLOAT
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.vectors import call
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.walk import add_rows, begin_rows
from art_pixeldefend.models.pixelcnnpp.network import STAGES

compiled = njit(error_model="numpy", nogil=True, no_cpython_wrapper=True)


# Sums over the row above


@compiled
def u_above(walk, layer, nodes, width, slot, first, end):
    """Of both convolutions of the ``u`` resnet, for columns first..end of the row in ``slot``."""
    f, active = walk.filters, walk.active
    narrow, wide = walk.narrow * VECTOR, walk.wide * VECTOR
    above, rows = ((1 - slot) * (width + 2) + first) * active, end - first
    x, sums = nodes[layer.source].u_active + above, layer.u_sums + first * narrow
    begin_rows(walk, layer.u_bias, x, active, layer.u_above, sums, narrow, rows, 6 * f, walk.narrow)
    middle, sums = layer.u_middle + above, layer.u_out_sums + first * wide
    begin_rows(walk, layer.u_out_bias, middle, active, layer.u_out_above, sums, wide, rows, 6 * f, walk.wide)


@compiled
def ul_above(walk, layer, nodes, width, slot, first, end):
    """Of both convolutions of the ``ul`` resnet; reads the row above up to column end - 1."""
    f, active = walk.filters, walk.active
    narrow, wide = walk.narrow * VECTOR, walk.wide * VECTOR
    above, rows = ((1 - slot) * (width + 2) + first) * active, end - first
    x, sums = nodes[layer.source].ul_active + above, layer.ul_sums + first * narrow
    begin_rows(walk, layer.ul_bias, x, active, layer.ul_above, sums, narrow, rows, 4 * f, walk.narrow)
    middle, sums = layer.ul_middle + above, layer.ul_out_sums + first * wide
    begin_rows(walk, layer.ul_out_bias, middle, active, layer.ul_out_above, sums, wide, rows, 4 * f, walk.wide)


@compiled
def every_u_above(walk, level, layers, nodes, row, first, end):
    """Of all layers of a level."""
    for begin, until in ((level.up, level.up_end), (level.down, level.down_end)):
        for layer in range(begin, until):
            u_above(walk, layers[layer], nodes, level.width, row % 2, first, end)


@compiled
def every_ul_above(walk, level, layers, nodes, row, first, end):
    """Of all layers of a level."""
    for begin, until in ((level.up, level.up_end), (level.down, level.down_end)):
        for layer in range(begin, until):
            ul_above(walk, layers[layer], nodes, level.width, row % 2, first, end)


@compiled
def prepare_first_rows(walk, crew, levels, layers, nodes):
    """Of the first row of every level, above which there are zeros."""
    for s in range(STAGES):
        level = levels[s]
        first, end = share(crew, level.width)
        every_u_above(walk, level, layers, nodes, 0, first, end)
        every_ul_above(walk, level, layers, nodes, 0, first, end)


# The row itself


@compiled
def u_middle(walk, layer, nodes, width, slot, first, end):
    """The first convolution of the ``u`` resnet and its activation."""
    f, active, narrow = walk.filters, walk.active, walk.narrow * VECTOR
    here, rows = (slot * (width + 2) + first) * active, end - first
    sums = layer.u_sums + first * narrow
    x = nodes[layer.source].u_active + here
    add_rows(walk, x, active, layer.u_here, sums, narrow, rows, 6 * f, walk.narrow)
    if layer.skip >= 0:
        aside = nodes[layer.skip].u_active + here + active
        add_rows(walk, aside, active, layer.u_skip, sums, narrow, rows, 2 * f, walk.narrow)
    for image in range(walk.images):
        cache = walk.caches + image * walk.stride
        call(walk.activate, (cache + sums, narrow, cache + layer.u_middle + here + active, active, rows, f))


@compiled
def u_out(walk, layer, nodes, width, slot, first, end):
    """The second convolution of the ``u`` resnet and its gate."""
    f, plain, active, wide = walk.filters, walk.plain, walk.active, walk.wide * VECTOR
    position, rows = slot * (width + 2) + first, end - first
    here, sums = position * active, layer.u_out_sums + first * wide
    source, target = nodes[layer.source], nodes[layer.target]
    add_rows(walk, layer.u_middle + here, active, layer.u_out_here, sums, wide, rows, 6 * f, walk.wide)
    for image in range(walk.images):
        cache = walk.caches + image * walk.stride
        old, new = cache + source.u + (position + 1) * plain, cache + target.u + (position + 1) * plain
        new_active = cache + target.u_active + here + active
        call(walk.gate, (cache + sums, wide, old, plain, new, plain, new_active, active, rows, f))


@compiled
def ul_skip(walk, layer, nodes, width, slot, first, end):
    """What the ``ul`` resnet reads of ``u``: its own column."""
    f, active, narrow = walk.filters, walk.active, walk.narrow * VECTOR
    u = nodes[layer.target].u_active + (slot * (width + 2) + first + 1) * active
    add_rows(walk, u, active, layer.ul_u, layer.ul_sums + first * narrow, narrow, end - first, 2 * f, walk.narrow)


@compiled
def row_of_layers(walk, crew, layers, nodes, begin, until, width, slot):
    """A row of the layers begin..until of one level."""
    first, end = share(crew, width)
    for number in range(begin, until):
        layer = layers[number]
        if crew.count == 1:
            u_above(walk, layer, nodes, width, slot, first, end)
            ul_above(walk, layer, nodes, width, slot, first, end)
        u_middle(walk, layer, nodes, width, slot, first, end)
        meet(crew)
        u_out(walk, layer, nodes, width, slot, first, end)
        ul_skip(walk, layer, nodes, width, slot, first, end)
        meet(crew)


@compiled
def place_u(walk, node, width, slot, first, end):
    """Sums in the scratch become columns of a node's row of the ``u`` stream."""
    plain, active, narrow = walk.plain, walk.active, walk.narrow * VECTOR
    position = slot * (width + 2) + first + 1
    for image in range(walk.images):
        cache = walk.caches + image * walk.stride
        sums = cache + walk.scratch + first * narrow
        out, out_active = cache + node.u + position * plain, cache + node.u_active + position * active
        call(walk.place, (sums, narrow, out, plain, out_active, active, end - first, walk.filters))


@compiled
def start_row(walk, crew, model, level, nodes, row):
    """The first convolutions, which read the image itself."""
    narrow, width = walk.narrow * VECTOR, level.width
    first, end = share(crew, width)
    pixel, rows = FLOAT * (model.channels + 1), end - first
    depth, shift = 3 * (model.channels + 1), first * narrow
    above = model.image + (row * (width + 2) + first) * pixel  # the image has two rows of zeros on top
    here = above + (width + 2) * pixel
    sums, ul_sums = walk.scratch + shift, model.start_ul_sums + shift
    begin_rows(walk, model.start_u_bias, above, pixel, model.start_u_above, sums, narrow, rows, depth, walk.narrow)
    add_rows(walk, here, pixel, model.start_u_here, sums, narrow, rows, depth, walk.narrow)
    place_u(walk, nodes[level.up_first], width, row % 2, first, end)
    begin_rows(walk, model.start_ul_bias, here, pixel, model.start_ul_above, ul_sums, narrow, rows, depth, walk.narrow)
    meet(crew)


@compiled
def shrink_row(walk, crew, finer, level, nodes, row):
    """The strided convolutions, from rows 2 I - 1 and 2 I of the finer level."""
    narrow, plain, f = walk.narrow * VECTOR, walk.plain, walk.filters
    first, end = share(crew, level.width)
    rows, shift = end - first, first * narrow
    # Row 2 I is in slot 0. Column 2 J - 1 is 2 J columns from the left, where there is a column of zeros.
    source, here = nodes[finer.up_last], 2 * first * plain
    above = here + (finer.width + 2) * plain
    sums, ul_sums = walk.scratch + shift, level.shrink_ul_sums + shift
    u, ul = source.u, source.ul + above
    bias, depth = level.shrink_u_bias, 3 * f
    begin_rows(walk, bias, u + above, 2 * plain, level.shrink_u_above, sums, narrow, rows, depth, walk.narrow)
    add_rows(walk, u + here, 2 * plain, level.shrink_u_here, sums, narrow, rows, depth, walk.narrow)
    place_u(walk, nodes[level.up_first], level.width, row % 2, first, end)
    bias, depth = level.shrink_ul_bias, 2 * f
    begin_rows(walk, bias, ul, 2 * plain, level.shrink_ul_above, ul_sums, narrow, rows, depth, walk.narrow)
    meet(crew)


@compiled
def grow_row(walk, crew, coarser, level, nodes, row):
    """The transposed convolution of the ``u`` stream, from row ``row // 2`` of the coarser level."""
    narrow, plain, f = walk.narrow * VECTOR, walk.plain, walk.filters
    first, end = share(crew, coarser.width)
    columns = 2 * first, min(2 * end, level.width)
    x = nodes[coarser.down_last].u + ((row // 2 % 2) * (coarser.width + 2) + first + 1) * plain
    even = level.grow_u_10 if row % 2 else level.grow_u_00
    odd = level.grow_u_11 if row % 2 else level.grow_u_01
    bias, sums, step = level.grow_u_bias, walk.scratch + columns[0] * narrow, 2 * narrow
    count = columns[1] - columns[0]
    begin_rows(walk, bias, x, plain, even, sums, step, (count + 1) // 2, f, walk.narrow)
    begin_rows(walk, bias, x, plain, odd, sums + narrow, step, count // 2, 2 * f, walk.narrow)
    place_u(walk, nodes[level.down_first], level.width, row % 2, columns[0], columns[1])
    meet(crew)


@compiled
def begin_row(walk, crew, model, levels, layers, nodes, row):
    """Everything that the rows above decide, at every level that is due."""
    start_row(walk, crew, model, levels[0], nodes, row)
    due = 0
    for s in range(STAGES):
        if row % (1 << s):
            break
        due, here, level = s, row >> s, levels[s]
        if s:
            shrink_row(walk, crew, levels[s - 1], level, nodes, here)
        row_of_layers(walk, crew, layers, nodes, level.up, level.up_end, level.width, here % 2)
    for s in range(due, -1, -1):
        here, level = row >> s, levels[s]
        if s < STAGES - 1:
            grow_row(walk, crew, levels[s + 1], level, nodes, here)
        row_of_layers(walk, crew, layers, nodes, level.down, level.down_end, level.width, here % 2)
