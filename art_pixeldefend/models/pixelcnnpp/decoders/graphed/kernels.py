"""Triton kernels for decoding on a GPU, each one pass over memory.

With ``TRITON_INTERPRET=1`` in the environment they run on a CPU as well, slowly.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import mixture
from art_pixeldefend.models.pixelcnnpp.passes.triton_kernels import elus, sigmoid

BLOCK = 512  # numbers per program
CHUNK = 16  # levels at a time
HALF, LEVELS = tl.constexpr(mixture.HALF), tl.constexpr(mixture.LEVELS)
MIN_LOG_SCALE, MAX_LOG_SCALE = tl.constexpr(mixture.MIN_LOG_SCALE), tl.constexpr(mixture.MAX_LOG_SCALE)
MEAN_LIMIT = tl.constexpr(mixture.MEAN_LIMIT)


@triton.jit
def _store_concat_elu(value, active, offset, lower, mask):
    """Store elu of a value, and ``lower`` numbers further elu of its negative."""
    up, down = elus(value)
    dtype = active.dtype.element_ty
    tl.store(active + offset, up.to(dtype), mask=mask)
    tl.store(active + offset + lower, down.to(dtype), mask=mask)


@triton.jit
def _concat_elu(
    x, out, count, size1, size2, x0, x1, x2, out0, out1, out2, lower, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    i0, i1, i2 = i // (size1 * size2), (i // size2) % size1, i % size2
    value = tl.load(x + i0 * x0 + i1 * x1 + i2 * x2, mask=mask).to(tl.float32)
    _store_concat_elu(value, out, i0 * out0 + i1 * out1 + i2 * out2, lower, mask)


@triton.jit
def _gate(
    x, ab, out, active, count, size1, size2, x0, x1, x2, ab0, ab1, ab2, out0, out1, out2, active0, active1, active2,
    ab_lower, active_lower, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    i0, i1, i2 = i // (size1 * size2), (i // size2) % size1, i % size2
    a = ab + i0 * ab0 + i1 * ab1 + i2 * ab2
    b = tl.load(a + ab_lower, mask=mask).to(tl.float32)
    value = tl.load(x + i0 * x0 + i1 * x1 + i2 * x2, mask=mask).to(tl.float32)
    value += tl.load(a, mask=mask).to(tl.float32) * sigmoid(b)
    value = value.to(out.dtype.element_ty)
    tl.store(out + i0 * out0 + i1 * out1 + i2 * out2, value, mask=mask)
    offset = i0 * active0 + i1 * active1 + i2 * active2
    _store_concat_elu(value.to(tl.float32), active, offset, active_lower, mask)


@triton.jit
def _choose(
    outputs, x, levels, image, changed, invalid, eps, count, column, feature, number,
    CHANNEL: tl.constexpr, CHANNELS: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0)
    k = tl.arange(0, PADDED_K)
    mask = k < K
    own = outputs + m.to(tl.int64) * (K * (1 + 2 * CHANNELS + CHANNELS * (CHANNELS - 1) // 2)) + k
    weights = tl.load(own, mask=mask, other=-float("inf")).to(tl.float64)
    means = tl.load(own + (1 + CHANNEL) * K, mask=mask, other=0).to(tl.float64)
    scales = tl.load(own + (1 + CHANNELS + CHANNEL) * K, mask=mask, other=0).to(tl.float64)
    total = weights + means + scales  # NaN times 0 is NaN, and so is infinity times 0
    means = means * HALF + HALF
    for earlier in tl.static_range(CHANNEL):
        at = own + (1 + 2 * CHANNELS + CHANNEL * (CHANNEL - 1) // 2 + earlier) * K
        coefficient = tl.load(at, mask=mask, other=0).to(tl.float64)
        total += coefficient
        tanh = 2 / (1 + tl.exp(-2 * coefficient)) - 1
        means += tanh * (tl.load(levels + m * CHANNELS + earlier).to(tl.float64) - HALF)
    tl.atomic_add(invalid, 1, mask=tl.sum(tl.where(mask, total * 0, 0.0), axis=0) != 0)
    means = tl.minimum(tl.maximum(means, -MEAN_LIMIT), MEAN_LIMIT)
    inverse = tl.exp(-tl.minimum(tl.maximum(scales, MIN_LOG_SCALE), MAX_LOG_SCALE)) / HALF

    # As in mixture.masses. All is multiplied by exp(-most), which makes the best level's mass about 1: none underflows.
    half = inverse / 2
    square = half * half
    sinh = half * (2 + square / 3 * (1 + square / 20 * (1 + square / 42)))  # 2 sinh(half) where half is small
    growing, falling = tl.exp(half), tl.exp(-half)
    sinh = tl.where(half < 0.03, sinh, growing - falling)
    inner = weights + tl.log(sinh)
    value = tl.load(x + m * CHANNELS + CHANNEL).to(tl.int32)
    low, high = tl.maximum(value - eps, 0), tl.minimum(value + eps, LEVELS - 1)
    first, last = (0.5 - means) * inverse, (means - (LEVELS - 1.5)) * inverse
    distance = tl.maximum(tl.maximum(low - means, means - high), 0.0) * inverse
    largest = inner - distance
    largest = tl.where(low == 0, tl.maximum(largest, weights + tl.minimum(first, 0.0)), largest)
    largest = tl.where(high == LEVELS - 1, tl.maximum(largest, weights + tl.minimum(last, 0.0)), largest)
    most = tl.max(largest, axis=0)
    # Levels 0 and 255 extend to infinity.
    below = tl.sum(tl.exp(weights - most + tl.minimum(first, 0.0)) / (1 + tl.exp(-tl.abs(first))), axis=0)
    above = tl.sum(tl.exp(weights - most + tl.minimum(last, 0.0)) / (1 + tl.exp(-tl.abs(last))), axis=0)

    near, far = tl.exp(-distance)[:, None], tl.exp(inner - most - distance)[:, None]
    middle = (growing + falling)[:, None]
    largest_mass, best = tl.full((), -1.0, tl.float64), low
    for begin in range(0, WINDOW, CHUNK):
        z = low + begin + tl.arange(0, CHUNK)
        away = tl.abs(z.to(tl.float64)[None, :] - means[:, None]) * inverse[:, None]
        further = tl.exp(distance[:, None] - away)
        small = further * near
        masses = tl.sum(further * far / ((small + middle) * small + 1), axis=0)
        masses = tl.where(z == 0, below, tl.where(z == LEVELS - 1, above, masses))
        masses = tl.where(z <= high, masses, -1.0)
        mass = tl.max(masses, axis=0)
        best = tl.where(mass > largest_mass, low + begin + tl.argmax(masses, axis=0, tie_break_left=True), best)
        largest_mass = tl.maximum(mass, largest_mass)

    tl.atomic_add(changed, 1, mask=best != tl.load(levels + m * CHANNELS + CHANNEL).to(tl.int32))
    tl.store(levels + m * CHANNELS + CHANNEL, best.to(tl.uint8))
    at = image + (m // count) * column + CHANNEL * feature + (m % count) * number
    tl.store(at, ((best.to(tl.float32) - HALF) / HALF).to(image.dtype.element_ty))


def _in_memory_order(x: Tensor) -> Tensor:
    """Permute (n, F, N) so that the last axis has neighbouring numbers."""
    return x.permute(2, 0, 1) if x.stride(1) == 1 else x


def _launch(kernel, tensors: list[Tensor], halves: list[Tensor]) -> None:
    first = _in_memory_order(tensors[0])
    strides = [stride for tensor in tensors for stride in _in_memory_order(tensor).stride()]
    lower = [tensor.shape[1] // 2 * tensor.stride(1) for tensor in halves]
    count = first.numel()
    kernel[(triton.cdiv(count, BLOCK),)](*tensors, count, *first.shape[1:], *strides, *lower, BLOCK=BLOCK)


def concat_elu(x: Tensor, out: Tensor) -> None:
    """``out`` (n, 2 F, N) = elu(x) and elu(-x) of ``x`` (n, F, N)."""
    _launch(_concat_elu, [x, out], [out])


def gate(x: Tensor, ab: Tensor, out: Tensor, active: Tensor) -> None:
    """``out`` (n, F, N) = ``x`` + a sigmoid(b) for (a, b) = ``ab`` (n, 2 F, N); ``active`` = its concat_elu."""
    _launch(_gate, [x, ab, out, active], [ab, active])


def choose(
    outputs: Tensor, x: Tensor, levels: Tensor, image: Tensor, changed: Tensor, invalid: Tensor, eps: int
) -> None:
    """Choose the most likely levels within ``eps`` of the input in float64; the lowest of several equally likely ones.

    Args:
        outputs: of the network, (n N, P).
        x: levels of the input (n, N, C), uint8.
        levels: the chosen levels (n, N, C), uint8, written.
        image: the same as the network reads them, (n, C, N), written.
        changed: counter of the levels that have changed, added to.
        invalid: counter of the sub-pixels whose outputs are not finite, added to.
        eps: radius in levels.
    """
    columns, count, channels = x.shape
    mixtures = outputs.shape[1] // mixture.parameters_per_pixel(channels, 1)
    padded, window = triton.next_power_of_2(mixtures), min(2 * eps + 1, mixture.LEVELS)
    for channel in range(channels):
        _choose[(columns * count,)](
            outputs, x, levels, image, changed, invalid, eps, count, *image.stride(), channel, channels, mixtures,
            padded, window, CHUNK,
            num_warps=1,
        )  # fmt: skip
