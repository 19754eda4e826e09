"""What a GPU does between the matrix products of the walk, in Triton: one pass over memory each.

Under ``TRITON_INTERPRET=1`` they run on a CPU as well, slowly.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import mixture
from art_pixeldefend.models.pixelcnnpp.passes.triton_kernels import elus, sigmoid

BLOCK = 512  # numbers a program
CHUNK = 16  # levels at a time
HALF, LEVELS = tl.constexpr(mixture.HALF), tl.constexpr(mixture.LEVELS)
MIN_LOG_SCALE, MAX_LOG_SCALE = tl.constexpr(mixture.MIN_LOG_SCALE), tl.constexpr(mixture.MAX_LOG_SCALE)
MEAN_LIMIT = tl.constexpr(mixture.MEAN_LIMIT)


@triton.jit
def _store_concat_elu(value, active, where, lower, there):
    """elu of a value and, ``lower`` numbers further, of its negative."""
    up, down = elus(value)
    kind = active.dtype.element_ty
    tl.store(active + where, up.to(kind), mask=there)
    tl.store(active + where + lower, down.to(kind), mask=there)


@triton.jit
def _concat_elu(
    x, out, count, size1, size2, x0, x1, x2, out0, out1, out2, lower, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    i0, i1, i2 = i // (size1 * size2), (i // size2) % size1, i % size2
    value = tl.load(x + i0 * x0 + i1 * x1 + i2 * x2, mask=there).to(tl.float32)
    _store_concat_elu(value, out, i0 * out0 + i1 * out1 + i2 * out2, lower, there)


@triton.jit
def _gate(
    x, ab, out, active, count, size1, size2, x0, x1, x2, ab0, ab1, ab2, out0, out1, out2, active0, active1, active2,
    ab_lower, active_lower, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    i0, i1, i2 = i // (size1 * size2), (i // size2) % size1, i % size2
    a = ab + i0 * ab0 + i1 * ab1 + i2 * ab2
    b = tl.load(a + ab_lower, mask=there).to(tl.float32)
    value = tl.load(x + i0 * x0 + i1 * x1 + i2 * x2, mask=there).to(tl.float32)
    value += tl.load(a, mask=there).to(tl.float32) * sigmoid(b)
    kind = out.dtype.element_ty
    value = value.to(kind)
    tl.store(out + i0 * out0 + i1 * out1 + i2 * out2, value, mask=there)
    where = i0 * active0 + i1 * active1 + i2 * active2
    _store_concat_elu(value.to(tl.float32), active, where, active_lower, there)


@triton.jit
def _choose(
    outputs, x, levels, image, changed, eps, count, column, feature, number,
    CHANNEL: tl.constexpr, CHANNELS: tl.constexpr, K: tl.constexpr, ROOM: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0)
    k = tl.arange(0, ROOM)
    there = k < K
    mine = outputs + m.to(tl.int64) * (K * (1 + 2 * CHANNELS + CHANNELS * (CHANNELS - 1) // 2)) + k
    weights = tl.load(mine, mask=there, other=-float("inf")).to(tl.float64)
    means = tl.load(mine + (1 + CHANNEL) * K, mask=there, other=0).to(tl.float64) * HALF + HALF
    for earlier in tl.static_range(CHANNEL):
        at = mine + (1 + 2 * CHANNELS + CHANNEL * (CHANNEL - 1) // 2 + earlier) * K
        coefficient = tl.load(at, mask=there, other=0).to(tl.float64)
        tanh = 2 / (1 + tl.exp(-2 * coefficient)) - 1
        means += tanh * (tl.load(levels + m * CHANNELS + earlier).to(tl.float64) - HALF)
    means = tl.minimum(tl.maximum(means, -MEAN_LIMIT), MEAN_LIMIT)
    scales = tl.load(mine + (1 + CHANNELS + CHANNEL) * K, mask=there, other=0).to(tl.float64)
    inverse = tl.exp(-tl.minimum(tl.maximum(scales, MIN_LOG_SCALE), MAX_LOG_SCALE)) / HALF

    # As in mixture.masses. All is multiplied by exp(-most), which makes the best level's mass about 1: none underflows.
    half = inverse / 2
    square = half * half
    sinh = half * (2 + square / 3 * (1 + square / 20 * (1 + square / 42)))  # where half is small; twice each
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
    # Levels 0 and 255 reach to infinity.
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
        total = tl.sum(further * far / ((small + middle) * small + 1), axis=0)
        total = tl.where(z == 0, below, tl.where(z == LEVELS - 1, above, total))
        total = tl.where(z <= high, total, -1.0)
        mass = tl.max(total, axis=0)
        best = tl.where(mass > largest_mass, low + begin + tl.argmax(total, axis=0, tie_break_left=True), best)
        largest_mass = tl.maximum(mass, largest_mass)

    tl.atomic_add(changed, 1, mask=best != tl.load(levels + m * CHANNELS + CHANNEL).to(tl.int32))
    tl.store(levels + m * CHANNELS + CHANNEL, best.to(tl.uint8))
    known = (best.to(tl.float32) - HALF) / HALF
    at = image + (m // count) * column + CHANNEL * feature + (m % count) * number
    tl.store(at, known.to(image.dtype.element_ty))


def _as_stored(x: Tensor) -> Tensor:
    """(n, F, N) with its axes in the order in which they lie in memory."""
    return x.permute(2, 0, 1) if x.stride(1) == 1 else x


def _launch(kernel, tensors: list[Tensor], halves: list[Tensor]) -> None:
    first = _as_stored(tensors[0])
    strides = [stride for tensor in tensors for stride in _as_stored(tensor).stride()]
    lower = [tensor.shape[1] // 2 * tensor.stride(1) for tensor in halves]
    count = first.numel()
    kernel[(triton.cdiv(count, BLOCK),)](*tensors, count, *first.shape[1:], *strides, *lower, BLOCK=BLOCK)


def concat_elu(x: Tensor, out: Tensor) -> None:
    """elu(x) and elu(-x), one above the other, of ``x`` (n, F, N) into ``out`` (n, 2 F, N)."""
    _launch(_concat_elu, [x, out], [out])


def gate(x: Tensor, ab: Tensor, out: Tensor, active: Tensor) -> None:
    """``out`` (n, F, N) = ``x`` + a sigmoid(b), of a and b one above the other; ``active`` its concat_elu."""
    _launch(_gate, [x, ab, out, active], [ab, active])


def choose(params: Tensor, x: Tensor, levels: Tensor, image: Tensor, changed: Tensor, eps: int) -> None:
    """The most likely levels within ``eps`` of the input, in float64; the lowest, should several be equally likely.

    Args:
        params: network outputs (n N, P).
        x: the input's levels (n, N, C), uint8.
        levels: what they become, (n, N, C), uint8.
        image: the same as the network wants it, (n, C, N).
        changed: to this number is added how many of ``levels`` are not what they were.
        eps: radius in levels.
    """
    columns, count, channels = x.shape
    mixtures = params.shape[1] // mixture.parameters_per_pixel(channels, 1)
    room, window = triton.next_power_of_2(mixtures), min(2 * eps + 1, mixture.LEVELS)
    for channel in range(channels):
        _choose[(columns * count,)](
            params, x, levels, image, changed, eps, count, *image.stride(), channel, channels, mixtures, room,
            window, CHUNK,
            num_warps=1,
        )  # fmt: skip
