"""One walk over the pixels of a few images in lock-step, every activation computed once.

When a row begins, all that the rows above decide is computed; then, pixel by pixel, the rest of the network's outputs,
and the choice of the level. A crew walks over one image: its members share out the beginning of every row, then the
first one goes on to the pixels, and the other follows: see :mod:`~.follower`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import carray, njit

from art_pixeldefend.models.pixelcnnpp.decoders.compiled.crew import meet
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.follower import follow_row, make_log, prepare_rest
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.head import WINDOW, best_level, components, make_table
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.kernels import SOURCES
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.pixels import parameters_of_pixel
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.rows import begin_row, prepare_first_rows
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.vectors import floats_at
from art_pixeldefend.models.pixelcnnpp.mixture import HALF, LEVELS


def _compile(sources: int) -> Callable:
    """The whole walk; ``sources`` as in the kernels."""

    @njit(error_model="numpy", nogil=True, cache=True)
    def decode(walk, crew, model, levels, layers, nodes, x, eps, purified):
        """Purify levels ``x`` (images, C, H, W) into ``purified``; caches are all zeros but for the channel of ones."""
        _ = sources
        model = model[0]
        channels, mixtures = model.channels, model.mixtures
        height, width = levels[0].height, levels[0].width
        table, mass, pixel = make_table(mixtures), np.empty(WINDOW), np.empty(channels)
        log = make_log(layers)
        if crew.count > 1:
            prepare_first_rows(walk, crew, levels, layers, nodes)
            meet(crew)
        for row in range(height):
            begin_row(walk, crew, model, levels, layers, nodes, row)
            if crew.number > 0:
                follow_row(walk, crew, log, levels, layers, nodes, row)
                prepare_rest(walk, crew, levels, layers, nodes, row)
                continue
            for column in range(width):
                parameters_of_pixel(walk, crew, log, model, levels, layers, nodes, row, column)
                for image in range(walk.images):
                    cache = walk.caches + image * walk.stride
                    position = ((row + 2) * (width + 2) + column + 1) * (channels + 1)
                    values = carray(floats_at(cache + model.image), (height + 2) * (width + 2) * (channels + 1))
                    for k in range(channels):
                        value = np.int64(x[image, k, row, column])
                        low, high = max(value - eps, 0), min(value + eps, LEVELS - 1)
                        components(walk.mixture, cache + model.parameters, pixel, k, channels, mixtures, table)
                        level = best_level(walk.masses, table, mixtures, low, high, mass)
                        pixel[k] = level
                        purified[image, k, row, column] = level
                        values[position + k] = (level - HALF) / HALF
            if crew.count > 1:
                prepare_rest(walk, crew, levels, layers, nodes, row)

    return decode


decode = _compile(SOURCES)
