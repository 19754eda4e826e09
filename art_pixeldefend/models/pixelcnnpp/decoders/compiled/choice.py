"""The most likely level of a sub-pixel within its range, from the network's outputs, in double precision."""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from art_pixeldefend.models.pixelcnnpp.mixture import (
    HALF,
    LEVELS,
    MAX_LOG_SCALE,
    MEAN_LIMIT,
    MIN_LOG_SCALE,
    SMALLEST,
)

# Rows of the table of a mixture's components: weight, mean and 1 / scale in levels, 2 weight sinh(h), 2 cosh(h) with
# h = 1 / (2 scale).
WEIGHT, MEAN, INVERSE_SCALE, FACTOR, SPREAD = range(5)
TABLE_ROWS = 5
BLOCK = 16  # levels whose masses are computed together
PADDING = 8  # components that are computed together

compiled = njit(error_model="numpy", nogil=True, fastmath={"contract"})
inline = njit(error_model="numpy", nogil=True, inline="always")


@intrinsic
def _double(context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), generate


@inline
def exp(x):
    """exp of -708 <= x <= 709 to rounding; at -708 for smaller x. Unlike math.exp it is vectorised."""
    x = -708.0 if x < -708.0 else x
    n = np.floor(x * 1.4426950408889634 + 0.5)
    r = x - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10  # log 2 in two parts
    p = 1 / 479001600
    p = p * r + 1 / 39916800
    p = p * r + 1 / 3628800
    p = p * r + 1 / 362880
    p = p * r + 1 / 40320
    p = p * r + 1 / 5040
    p = p * r + 1 / 720
    p = p * r + 1 / 120
    p = p * r + 1 / 24
    p = p * r + 1 / 6
    p = p * r + 1 / 2
    p = p * r + 1.0
    p = p * r + 1.0
    return p * _double((np.int64(n) + np.int64(1023)) << np.int64(52))


@inline
def tanh(x):
    """The hyperbolic tangent."""
    small = exp(-2.0 * abs(x))
    size = (1.0 - small) / (1.0 + small)
    return size if x > 0.0 else -size


@compiled
def make_table(mixtures):
    """Memory for the components of a mixture, padded to whole vectors: (TABLE_ROWS, mixtures or more)."""
    return np.empty((TABLE_ROWS, -(-mixtures // PADDING) * PADDING))


@compiled
def components(params, pixel, channel, channels, mixtures, table):
    """Compute the mixture of one channel given the pixel's earlier channels, as :func:`.mixture.components` does.

    Args:
        params: the network's outputs at the pixel, followed by PADDING numbers that can be read.
        pixel: its levels.
        channel, channels, mixtures: which channel, and how many channels and components there are.
        table: of :func:`make_table`, written.
    """
    weight, mean, inverse_scale, factor, spread = table[0], table[1], table[2], table[3], table[4]
    padded = table.shape[1]  # the numbers beyond ``mixtures`` are computed but not used
    first = (1 + channel) * mixtures
    logits, means = params[:padded], params[first : first + padded]
    first = (1 + channels + channel) * mixtures
    log_scales = params[first : first + padded]
    most = logits[0]
    for k in range(1, mixtures):
        most = max(most, logits[k])
    for k in range(padded):
        inverse_scale[k] = exp(-min(max(np.float64(log_scales[k]), MIN_LOG_SCALE), MAX_LOG_SCALE)) * (1 / HALF)
        half = inverse_scale[k] * 0.5
        growing = exp(half)
        falling = 1.0 / growing
        spread[k] = growing + falling
        # 2 sinh(h): the difference of two exponentials loses digits where h is small; the series does not.
        s = half * half
        series = 1.0 + s * (1 / 42) * (1.0 + s * (1 / 72) * (1.0 + s * (1 / 110) * (1.0 + s * (1 / 156))))
        series = 1.0 + s * (1 / 6) * (1.0 + s * (1 / 20) * series)
        factor[k] = growing - falling if half > 0.5 else 2.0 * half * series
    for k in range(padded):
        weight[k] = exp(np.float64(logits[k]) - most)
        mean[k] = means[k] * HALF + HALF
    for earlier in range(channel):
        first = (1 + 2 * channels + channel * (channel - 1) // 2 + earlier) * mixtures
        coefficients, level = params[first : first + padded], pixel[earlier] - HALF
        for k in range(padded):
            mean[k] += tanh(np.float64(coefficients[k])) * level
    total = 0.0
    for k in range(mixtures):
        total += weight[k]
    for k in range(padded):
        mean[k] = min(max(mean[k], -MEAN_LIMIT), MEAN_LIMIT)
        weight[k] /= total
        factor[k] *= weight[k]


@compiled
def best_level(table, mixtures, low, high, masses):
    """The level of the largest mass in low..high, the lowest of several.

    P(z) = sum_k w_k [sigmoid(c + h) - sigmoid(c - h)] = sum_k w_k 2 sinh(h) / (2 cosh(h) + 2 cosh(c)),
    c = (z - m_k) / s_k, h = 1 / (2 s_k): one exponential per component, and nothing cancels.

    Args:
        table: the components.
        mixtures: how many there are.
        low, high: ends of the range, both included.
        masses: memory for LEVELS numbers.
    """
    mean, inverse_scale, factor, spread = table[1], table[2], table[3], table[4]
    count = high - low + 1
    for first in range(0, count, BLOCK):
        block = masses[first : first + BLOCK]
        block[:] = 0.0
        for k in range(mixtures):
            start, inverse, f, s = low + first - mean[k], inverse_scale[k], factor[k], spread[k]
            for i in range(BLOCK):
                small = exp(-abs((start + i) * inverse))
                block[i] += f * small / ((small + s) * small + 1.0)
    # Levels 0 and 255 extend to infinity.
    if low == 0:
        masses[0] = _end_mass(table, mixtures, 0.5, 1.0)
    if high == LEVELS - 1:
        masses[count - 1] = _end_mass(table, mixtures, LEVELS - 1.5, -1.0)
    best, most = 0, masses[0]
    for z in range(1, count):
        if masses[z] > most:
            best, most = z, masses[z]
    if most < SMALLEST:
        return _best_level_in_logarithms(table, mixtures, low, high)
    return low + best


@compiled
def _end_mass(table, mixtures, edge, sign):
    """Mass below (sign 1) or above (sign -1) an edge."""
    total = 0.0
    for k in range(mixtures):
        t = sign * (edge - table[MEAN, k]) * table[INVERSE_SCALE, k]
        small = math.exp(-abs(t))
        total += table[WEIGHT, k] * (1.0 if t > 0 else small) / (1.0 + small)
    return total


@compiled
def _log_sigmoid(t):
    return min(t, 0.0) - math.log1p(math.exp(-abs(t)))


@compiled
def _best_level_in_logarithms(table, mixtures, low, high):
    """Like :func:`best_level` where every mass underflows: far out in the tails of all components."""
    best, most = low, -np.inf
    for z in range(low, high + 1):
        largest, total = -np.inf, 0.0
        for k in range(mixtures):
            mean, inverse_scale = table[MEAN, k], table[INVERSE_SCALE, k]
            log_mass = math.log(table[WEIGHT, k])
            if z < LEVELS - 1:
                log_mass += _log_sigmoid((z + 0.5 - mean) * inverse_scale)
            if z > 0:
                log_mass += _log_sigmoid(-(z - 0.5 - mean) * inverse_scale)
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
