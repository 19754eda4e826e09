"""What every step of the walk is made of: products for a row of positions, or for one position of every image.

Addresses and steps are in bytes; those in the tables of a :class:`~.plan.Plan` count from the image's cache or from the
weights.
"""

from __future__ import annotations

from typing import NamedTuple

from numba import njit

from art_pixeldefend.models.pixelcnnpp.decoders.compiled.vectors import call

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
    mixture: int
    masses: int


@compiled
def begin_rows(walk, bias, x, x_step, matrix, out, out_step, rows, depth, vectors):
    """out = bias + x @ matrix for ``rows`` positions of every image."""
    for image in range(walk.images):
        cache = walk.caches + image * walk.stride
        start, weights = walk.weights + bias, walk.weights + matrix
        outs, inputs = cache + out, cache + x
        call(walk.product, (start, 0, inputs, x_step, weights, depth, 0, outs, out_step, rows, depth, vectors))


@compiled
def add_rows(walk, x, x_step, matrix, out, out_step, rows, depth, vectors):
    """out += x @ matrix for ``rows`` positions of every image."""
    for image in range(walk.images):
        cache = walk.caches + image * walk.stride
        sums, weights, inputs = cache + out, walk.weights + matrix, cache + x
        call(walk.product, (sums, out_step, inputs, x_step, weights, depth, 0, sums, out_step, rows, depth, vectors))


@compiled
def add_pixel(walk, x, matrix, out, depth, vectors):
    """out += x @ matrix for one position of every image."""
    add_part(walk, x, matrix, depth, 0, out, depth, vectors)


@compiled
def add_part(walk, x, matrix, height, above, out, depth, vectors):
    """out += x @ matrix[above : above + depth], of a matrix of ``height`` rows, for one position of every image."""
    sums, step = walk.caches + out, walk.stride
    inputs, weights = walk.caches + x, walk.weights + matrix
    call(walk.product, (sums, step, inputs, step, weights, height, above, sums, step, walk.images, depth, vectors))


@compiled
def begin_pixel(walk, bias, x, matrix, out, depth, vectors):
    """out = bias + x @ matrix for one position of every image."""
    start, weights, step = walk.weights + bias, walk.weights + matrix, walk.stride
    inputs, outs = walk.caches + x, walk.caches + out
    call(walk.product, (start, 0, inputs, step, weights, depth, 0, outs, step, walk.images, depth, vectors))
