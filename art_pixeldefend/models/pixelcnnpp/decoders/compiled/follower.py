"""What the second member of a crew does while the first one leads over the pixels of a row.

It follows, gated resnet by gated resnet, and adds to the sums of the next column what the one just done contributes:
the taps to the left, three sevenths of a pixel's weights. The leader needs them a whole pixel later, so that neither
waits for the other's latest number, and each core keeps its own part of the weights in its own cache.

While it is ahead it prepares the next row: the sums over this one, in small pieces. What is not prepared when the row
ends both share out. So the work is balanced whatever the width of the model and the speed of the caches; who computes a
sum never changes its order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from art_pixeldefend.models.pixelcnnpp.decoders.compiled.crew import (
    announce,
    meet,
    prepared,
    progress,
    report_prepared,
    wait_for,
)
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.kernels import VECTOR
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.rows import u_above, ul_above
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.walk import add_part
from art_pixeldefend.models.pixelcnnpp.network import STAGES

PIECES = 4  # of a row: one takes less time than a pixel

LEADER, FOLLOWER = 0, 1

compiled = njit(error_model="numpy", nogil=True, no_cpython_wrapper=True)


# Steps: the gated resnets in the order in which the leader goes through them


@compiled
def make_log(layers):
    """A member's own notes: at which step it was at each layer last, how many it has done, how many the other had."""
    return np.zeros(len(layers) + 2, dtype=np.int64)


@compiled
def take_step(crew, log, number):
    """Layer ``number`` is done at one more position."""
    log[-2] += 1
    log[number] = log[-2]
    announce(crew, log[-2])


@compiled
def await_left(crew, log, number):
    """Until the follower has added to the leader's next position what layer ``number`` gave at its last one."""
    if log[-1] < log[number]:  # what was seen once need not be looked up again: the other core's line is far
        log[-1] = wait_for(crew, FOLLOWER, log[number])


@compiled
def add_left(walk, layer, nodes, level, slot, column):
    """The taps to the left of the column after this one, in both convolutions of the ``ul`` resnet."""
    f, next_column = walk.filters, column + 1
    if next_column < level.width:
        left = (slot * (level.width + 2) + next_column) * walk.active
        sums = layer.ul_sums + next_column * walk.narrow * VECTOR
        add_part(walk, nodes[layer.source].ul_active + left, layer.ul_here, 4 * f, 0, sums, 2 * f, walk.narrow)
        sums = layer.ul_out_sums + next_column * walk.wide * VECTOR
        add_part(walk, layer.ul_middle + left, layer.ul_out_here, 4 * f, 0, sums, 2 * f, walk.wide)


# Pieces of the next row of every level: first those of the ``u`` stream, layer after layer; then those of ``ul``, which
# follow behind the pixels


@compiled
def can_prepare(layers, width, piece, columns):
    """Is there such a piece, and are the columns done that it reads?"""
    count = PIECES * len(layers)
    return piece < count or (piece < 2 * count and width * ((piece - count) // len(layers) + 1) // PIECES <= columns)


@compiled
def prepare(walk, levels, layers, nodes, row, piece):
    """Sums over the row above of one layer, for a piece of its columns; nothing where no row of it comes next."""
    count = PIECES * len(layers)
    of_u = piece < count
    number, part = (piece // PIECES, piece % PIECES) if of_u else (piece % len(layers), (piece - count) // len(layers))
    layer = layers[number]
    s, level = layer.level, levels[layer.level]
    below, first, end = (row >> s) + 1, level.width * part // PIECES, level.width * (part + 1) // PIECES
    if below == level.height or first == end:
        return
    # A row of a lower resolution is complete after the first row of those it stands for; none is due before the last.
    if of_u and row % (1 << s) == 0:
        u_above(walk, layer, nodes, level.width, below % 2, first, end)
    if not of_u and row % (1 << s) == (1 if s else 0):
        ul_above(walk, layer, nodes, level.width, below % 2, first, end)


@compiled
def prepare_rest(walk, crew, levels, layers, nodes, row):
    """What the follower found no time for."""
    meet(crew)
    for piece in range(prepared(crew) + crew.number, 2 * PIECES * len(layers), crew.count):
        prepare(walk, levels, layers, nodes, row, piece)
    meet(crew)


# The row


@compiled
def follow_row(walk, crew, log, levels, layers, nodes, row):
    """Behind the leader over all pixels of a row."""
    width, piece = levels[0].width, 0
    for column in range(width):
        due = 0
        for s in range(STAGES):
            if (row | column) % (1 << s):
                break
            due = s
            for number in range(levels[s].up, levels[s].up_end):
                piece = follow(walk, crew, log, levels, layers, nodes, row, column, number, piece)
        for s in range(due, -1, -1):
            for number in range(levels[s].down, levels[s].down_end):
                piece = follow(walk, crew, log, levels, layers, nodes, row, column, number, piece)
    report_prepared(crew, piece)


@compiled
def follow(walk, crew, log, levels, layers, nodes, row, column, number, piece):
    """One step behind the leader; the piece of the next row that is to be prepared now."""
    layer, step = layers[number], log[-2] + 1
    while progress(crew, LEADER) < step and can_prepare(layers, levels[0].width, piece, column):
        prepare(walk, levels, layers, nodes, row, piece)
        piece += 1
    wait_for(crew, LEADER, step)
    s = layer.level
    add_left(walk, layer, nodes, levels[s], (row >> s) % 2, column >> s)
    take_step(crew, log, number)
    return piece
