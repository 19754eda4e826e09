"""The most likely level of a sub-pixel within its range, from the network's outputs, in double precision."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from art_pixeldefend.models.pixelcnnpp.decoders.compiled.vectors import (
    BLOCK,
    COLUMNS,
    INVERSE_SCALE,
    MEAN,
    WEIGHT,
    call,
)
from art_pixeldefend.models.pixelcnnpp.mixture import LEVELS, SMALLEST

WINDOW = -(-LEVELS // BLOCK) * BLOCK  # room for the masses of a window of levels


compiled = njit(error_model="numpy", nogil=True, no_cpython_wrapper=True)


@compiled
def make_table(mixtures):
    """Room for a mixture's components: columns MEAN, INVERSE_SCALE, .. of ``vectors``, whole blocks of each."""
    return np.empty((COLUMNS, -(-mixtures // BLOCK) * BLOCK))


@compiled
def components(kernel, params, pixel, channel, channels, mixtures, table):
    """The mixture of one channel given the pixel's earlier channels: ``mixture.components``.

    ``params`` is the address of the network's outputs.
    """
    stride = table.shape[1] * table.itemsize
    call(kernel, (table.ctypes.data, params, stride, mixtures, channels, channel, pixel.ctypes.data))


@compiled
def best_level(masses, table, mixtures, low, high, mass):
    """The level of the largest mass in low..high, the lowest of several.

    P(z) = sum_k w_k [sigmoid(c + h) - sigmoid(c - h)] = sum_k w_k 2 sinh(h) / (2 cosh(h) + 2 cosh(c)),
    c = (z - m_k) / s_k, h = 1 / (2 s_k): one exponential, and nothing cancels.
    """
    count = high - low + 1
    call(masses, (mass.ctypes.data, table.ctypes.data, table.shape[1] * table.itemsize, mixtures, low, count))
    # Levels 0 and 255 reach to infinity.
    if low == 0:
        mass[0] = end_mass(table, mixtures, 0.5, 1.0)
    if high == LEVELS - 1:
        mass[count - 1] = end_mass(table, mixtures, LEVELS - 1.5, -1.0)
    best = 0
    for z in range(1, count):
        if mass[z] > mass[best]:
            best = z
    if mass[best] < SMALLEST:
        return best_level_in_logarithms(table, mixtures, low, high)
    return low + best


@compiled
def end_mass(table, mixtures, edge, sign):
    """Mass below (sign 1) or above (sign -1) an edge."""
    total = 0.0
    for k in range(mixtures):
        t = sign * (edge - table[MEAN, k]) * table[INVERSE_SCALE, k]
        small = math.exp(-abs(t))
        total += table[WEIGHT, k] * (1.0 if t > 0 else small) / (1.0 + small)
    return total


@compiled
def log_sigmoid(t):
    """log sigmoid(t) for any t."""
    return min(t, 0.0) - math.log1p(math.exp(-abs(t)))


@compiled
def best_level_in_logarithms(table, mixtures, low, high):
    """Like :func:`best_level` where every mass underflows: far out in the tails of all components."""
    best, most = low, -np.inf
    for z in range(low, high + 1):
        largest, total = -np.inf, 0.0
        for k in range(mixtures):
            mean, inverse_scale = table[MEAN, k], table[INVERSE_SCALE, k]
            log_mass = math.log(table[WEIGHT, k])
            if z < LEVELS - 1:
                log_mass += log_sigmoid((z + 0.5 - mean) * inverse_scale)
            if z > 0:
                log_mass += log_sigmoid(-(z - 0.5 - mean) * inverse_scale)
            if 0 < z < LEVELS - 1:
                log_mass += math.log(-math.expm1(-inverse_scale))
            if log_mass > largest:
                total = total * math.exp(largest - log_mass) + 1.0
                largest = log_mass
            elif log_mass > -np.inf:
                total += math.exp(log_mass - largest)
        log_mass = largest + math.log(total)
        if log_mass > most:
            best, most = z, log_mass
    return best
