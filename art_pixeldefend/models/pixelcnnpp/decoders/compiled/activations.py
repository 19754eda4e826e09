"""The elementwise operations between matrix products. All arguments are addresses and sizes in bytes, or counts."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from art_pixeldefend.models.pixelcnnpp.passes.numba_loops import exp, pointer

compiled = njit(error_model="numpy", nogil=True, fastmath={"contract"})

ZERO, ONE = np.float32(0), np.float32(1)


@compiled
def _row(address, numbers):
    return carray(pointer(address), numbers, np.float32)


@compiled
def concat_elu(x, x_step, out, out_step, count, filters):
    """out[r] = (elu(x[r]), elu(-x[r])) for ``count`` rows of ``filters`` numbers."""
    for r in range(count):
        source, up = _row(x + r * x_step, filters), _row(out + r * out_step, filters)
        down = _row(out + r * out_step + 4 * filters, filters)
        for c in range(filters):
            v = source[c]
            small = exp(-abs(v)) - ONE
            up[c] = v if v > ZERO else small
            down[c] = small if v > ZERO else -v


@compiled
def store(sums, sums_step, plain, plain_step, active, active_step, count, filters):
    """plain[r] = sums[r], and active[r] = concat_elu(sums[r])."""
    for r in range(count):
        source, target = _row(sums + r * sums_step, filters), _row(plain + r * plain_step, filters)
        for c in range(filters):
            target[c] = source[c]
    concat_elu(sums, sums_step, active, active_step, count, filters)


@compiled
def gate(x, x_step, ab, ab_step, plain, plain_step, active, active_step, count, filters):
    """plain[r] = x[r] + a[r] sigmoid(b[r]) for (a, b) = ab[r], and active[r] = concat_elu(plain[r])."""
    for r in range(count):
        source, target = _row(x + r * x_step, filters), _row(plain + r * plain_step, filters)
        a, b = _row(ab + r * ab_step, filters), _row(ab + r * ab_step + 4 * filters, filters)
        up = _row(active + r * active_step, filters)
        down = _row(active + r * active_step + 4 * filters, filters)
        for c in range(filters):
            small = exp(-abs(b[c]))
            v = source[c] + a[c] * ((ONE if b[c] > ZERO else small) / (ONE + small))
            target[c] = v
            small = exp(-abs(v)) - ONE
            up[c] = v if v > ZERO else small
            down[c] = small if v > ZERO else -v
