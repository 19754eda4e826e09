"""The most likely level of a sub-pixel within its range, from the network's outputs, in double precision."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from art_pixeldefend.decoding.compiled.vectors import BLOCK, call
from art_pixeldefend.density.mixture import HALF, LEVELS, MAX_LOG_SCALE, MEAN_LIMIT, MIN_LOG_SCALE

EDGES = -(-(LEVELS + 1) // BLOCK) * BLOCK
compiled = njit(error_model="numpy", nogil=True, no_cpython_wrapper=True)
SMALLEST = 1e-200  # a best level less likely than that is looked for again in logarithms


@compiled
def components(params, pixel, channel, channels, mixtures, weights, means, inverse_scales):
    """The mixture of one channel given the pixel's earlier channels: ``density.mixture.components``."""
    highest = params[0]
    for k in range(mixtures):
        highest = max(highest, params[k])
    total = 0.0
    for k in range(mixtures):
        weights[k] = math.exp(np.float64(params[k]) - highest)
        total += weights[k]
    first = 1 + 2 * channels + channel * (channel - 1) // 2
    for k in range(mixtures):
        weights[k] /= total
        mean = np.float64(params[(1 + channel) * mixtures + k]) * HALF + HALF
        for earlier in range(channel):
            coefficient = math.tanh(np.float64(params[(first + earlier) * mixtures + k]))
            mean += coefficient * (pixel[earlier] - HALF)
        log_scale = np.float64(params[(1 + channels + channel) * mixtures + k])
        means[k] = min(max(mean, -MEAN_LIMIT), MEAN_LIMIT)
        inverse_scales[k] = math.exp(-min(max(log_scale, MIN_LOG_SCALE), MAX_LOG_SCALE)) / HALF


@compiled
def best_level(edges, weights, means, inverse_scales, mixtures, low, high, mass, below, above):
    """The level of the largest mass in low..high, the lowest of several.

    P(z) = sum_k w_k sigmoid(b) sigmoid(-a) (1 - exp(a - b)); nothing cancels, and neighbours share the logistic
    functions of the edge between them.
    """
    count = high - low + 1
    for z in range(count):
        mass[z] = 0.0
    for k in range(mixtures):
        call(edges, (below.ctypes.data, above.ctypes.data, low - 0.5, means[k], inverse_scales[k], count + 1))
        inside = -math.expm1(-inverse_scales[k])
        # Levels 0 and 255 reach to infinity: no outer edge, and none of the factor that belongs to two edges.
        if low == 0:
            above[0] = 1.0 / inside
        if high == LEVELS - 1:
            below[count] = 1.0 / inside
        factor = weights[k] * inside
        for z in range(count):
            mass[z] += factor * below[z + 1] * above[z]
    best = 0
    for z in range(1, count):
        if mass[z] > mass[best]:
            best = z
    if mass[best] < SMALLEST:
        return best_level_in_logarithms(weights, means, inverse_scales, mixtures, low, high)
    return low + best


@compiled
def log_sigmoid(t):
    """log sigmoid(t) for any t."""
    return min(t, 0.0) - math.log1p(math.exp(-abs(t)))


@compiled
def best_level_in_logarithms(weights, means, inverse_scales, mixtures, low, high):
    """Like :func:`best_level` where every mass underflows: far out in the tails of all components."""
    best, most = low, -np.inf
    for z in range(low, high + 1):
        largest, total = -np.inf, 0.0
        for k in range(mixtures):
            log_mass = math.log(weights[k])
            if z < LEVELS - 1:
                log_mass += log_sigmoid((z + 0.5 - means[k]) * inverse_scales[k])
            if z > 0:
                log_mass += log_sigmoid(-(z - 0.5 - means[k]) * inverse_scales[k])
            if 0 < z < LEVELS - 1:
                log_mass += math.log(-math.expm1(-inverse_scales[k]))
            if log_mass > largest:
                total = total * math.exp(largest - log_mass) + 1.0
                largest = log_mass
            elif log_mass > -np.inf:
                total += math.exp(log_mass - largest)
        log_mass = largest + math.log(total)
        if log_mass > most:
            best, most = z, log_mass
    return best
