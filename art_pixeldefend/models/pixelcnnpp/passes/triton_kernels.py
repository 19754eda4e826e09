"""The passes of :mod:`~art_pixeldefend.models.pixelcnnpp.passes.fused` on a GPU, in Triton.

Under ``TRITON_INTERPRET=1`` they run on a CPU as well, slowly. Tensors are float32 or bfloat16 in the channels-last
layout; sums are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANCES = 1 << 16  # a dropout's probability is rounded to a multiple of 1 / CHANCES: one hash serves two numbers
BLOCK = 1024  # numbers a program


class Chance(NamedTuple):
    """A dropout: hashes below ``drop`` drop a number, ``scale`` is the factor of the others."""

    drop: int
    scale: float
    seeds: Tensor  # two, in the GPU's memory: a CUDA graph draws new ones whenever it is launched


def chance(probability: float, like: Tensor) -> Chance:
    """A dropout whose seeds are of torch's generator: its seed determines the run."""
    drop = min(round(probability * CHANCES), CHANCES - 1)
    return Chance(drop, CHANCES / (CHANCES - drop), torch.randint(1 << 31, (2,), device=like.device))


@triton.jit
def _hash(number, seeds):
    """32 bits that look random: the multiplications of "lowbias32"."""
    h = number.to(tl.uint32) * (tl.load(seeds + 1).to(tl.uint32) * 2 + 1) + tl.load(seeds).to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def elus(v):
    """elu(v) and elu(-v)."""
    small = tl.exp(-tl.abs(v)) - 1
    return tl.where(v > 0, v, small), tl.where(v > 0, small, -v)


@triton.jit
def sigmoid(v):
    """1 / (1 + exp(-v))."""
    return 1 / (1 + tl.exp(-v))


@triton.jit
def _concat_elu(
    x, y, seeds, count, drop, scale,
    F: tl.constexpr, H: tl.constexpr, W: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    LEFT: tl.constexpr, TOP: tl.constexpr, DROPPED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place, c = i // F, i % F
    column, row, n = place % WIDE - LEFT, place // WIDE % TALL - TOP, place // (WIDE * TALL)
    inside = (i < count) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    source = ((n * H + row) * W + column) * F + c
    up, down = elus(tl.load(x + source, mask=inside, other=0).to(tl.float32))
    if DROPPED:
        h = _hash(source, seeds)
        up = tl.where((h & 0xFFFF) >= drop, up * scale, 0.0)
        down = tl.where((h >> 16) >= drop, down * scale, 0.0)
    target = y + place * (2 * F) + c
    tl.store(target, up.to(y.dtype.element_ty), mask=i < count)
    tl.store(target + F, down.to(y.dtype.element_ty), mask=i < count)


@triton.jit
def _concat_elu_backward(
    y, gradient, result, seeds, count, drop, scale,
    F: tl.constexpr, H: tl.constexpr, W: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    LEFT: tl.constexpr, TOP: tl.constexpr, DROPPED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    place, c = i // F, i % F
    column, row, n = place % W + LEFT, place // W % H + TOP, place // (W * H)
    padded = ((n * TALL + row) * WIDE + column) * (2 * F) + c
    # elu' = 1 + elu where elu is negative
    up = scale + tl.minimum(tl.load(y + padded, mask=there, other=0).to(tl.float32), 0.0)
    down = scale + tl.minimum(tl.load(y + padded + F, mask=there, other=0).to(tl.float32), 0.0)
    up *= tl.load(gradient + padded, mask=there, other=0).to(tl.float32)
    down *= tl.load(gradient + padded + F, mask=there, other=0).to(tl.float32)
    if DROPPED:
        h = _hash(i, seeds)
        up = tl.where((h & 0xFFFF) >= drop, up, 0.0)
        down = tl.where((h >> 16) >= drop, down, 0.0)
    tl.store(result + i, (up - down).to(result.dtype.element_ty), mask=there)


@triton.jit
def _gate(x, ab, y, count, F: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    at = ab + i // F * (2 * F) + i % F
    a, b = tl.load(at, mask=there, other=0).to(tl.float32), tl.load(at + F, mask=there, other=0).to(tl.float32)
    value = tl.load(x + i, mask=there, other=0).to(tl.float32) + a * sigmoid(b)
    tl.store(y + i, value.to(y.dtype.element_ty), mask=there)


@triton.jit
def _gate_backward(ab, gradient, result, count, F: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    at = i // F * (2 * F) + i % F
    g = tl.load(gradient + i, mask=there, other=0).to(tl.float32)
    a = tl.load(ab + at, mask=there, other=0).to(tl.float32)
    s = sigmoid(tl.load(ab + at + F, mask=there, other=0).to(tl.float32))
    tl.store(result + at, (g * s).to(result.dtype.element_ty), mask=there)
    tl.store(result + at + F, (g * a * s * (1 - s)).to(result.dtype.element_ty), mask=there)


@triton.jit
def _weight_norm(direction, gain, norms, weight, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, SIZE, BLOCK):
        i = first + tl.arange(0, BLOCK)
        v = tl.load(direction + o * SIZE + i, mask=i < SIZE, other=0)
        total += v * v
    norm = tl.sqrt(tl.maximum(tl.sum(total, axis=0), 1e-24))
    tl.store(norms + o, norm)
    factor = tl.load(gain + o) / norm
    for first in range(0, SIZE, BLOCK):
        i = first + tl.arange(0, BLOCK)
        v = tl.load(direction + o * SIZE + i, mask=i < SIZE, other=0)
        tl.store(weight + o * SIZE + i, (v * factor).to(weight.dtype.element_ty), mask=i < SIZE)


@triton.jit
def _weight_norm_backward(
    direction, gain, norms, gradient, of_direction, of_gain, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    o = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, SIZE, BLOCK):
        i = first + tl.arange(0, BLOCK)
        g = tl.load(gradient + o * SIZE + i, mask=i < SIZE, other=0).to(tl.float32)
        total += g * tl.load(direction + o * SIZE + i, mask=i < SIZE, other=0)
    along, norm = tl.sum(total, axis=0), tl.load(norms + o)
    tl.store(of_gain + o, along / norm)
    factor, along = tl.load(gain + o) / norm, along / (norm * norm)
    for first in range(0, SIZE, BLOCK):
        i = first + tl.arange(0, BLOCK)
        g = tl.load(gradient + o * SIZE + i, mask=i < SIZE, other=0).to(tl.float32)
        v = tl.load(direction + o * SIZE + i, mask=i < SIZE, other=0)
        tl.store(of_direction + o * SIZE + i, (g - v * along) * factor, mask=i < SIZE)


def _programs(count: int) -> tuple[int]:
    return (triton.cdiv(count, BLOCK),)


def _shape(x: Tensor, y: Tensor, padding: tuple[int, int, int, int]) -> tuple[int, ...]:
    return *x.shape[1:], *y.shape[2:], padding[0], padding[2]


def concat_elu(x: Tensor, y: Tensor, padding: tuple[int, int, int, int], dropout: Chance | None) -> None:
    """``y`` (N, 2 F, H', W') = concat_elu of ``x`` (N, F, H, W), zeros around it."""
    drop, scale, seeds = dropout or (0, 1.0, x)
    count = y.numel() // 2
    _concat_elu[_programs(count)](
        x, y, seeds, count, drop, scale, *_shape(x, y, padding), dropout is not None, BLOCK=BLOCK
    )


def concat_elu_backward(
    y: Tensor, gradient: Tensor, result: Tensor, padding: tuple[int, int, int, int], dropout: Chance | None
) -> None:
    """``result`` (N, F, H, W): the gradient of what ``y`` was made of."""
    drop, scale, seeds = dropout or (0, 1.0, y)
    count = result.numel()
    _concat_elu_backward[_programs(count)](
        y, gradient, result, seeds, count, drop, scale, *_shape(result, y, padding), dropout is not None, BLOCK=BLOCK
    )


def gate(x: Tensor, ab: Tensor, y: Tensor) -> None:
    """``y`` = ``x`` + a sigmoid(b)."""
    _gate[_programs(x.numel())](x, ab, y, x.numel(), x.shape[1], BLOCK=BLOCK)


def gate_backward(ab: Tensor, gradient: Tensor, result: Tensor) -> None:
    """``result``: the gradient of ``ab``."""
    _gate_backward[_programs(gradient.numel())](ab, gradient, result, gradient.numel(), gradient.shape[1], BLOCK=BLOCK)


def weight_norm(direction: Tensor, gain: Tensor, norms: Tensor, weight: Tensor) -> None:
    """``weight`` = g v / |v|, and |v| into ``norms``."""
    _weight_norm[(len(gain),)](direction, gain, norms, weight, direction[0].numel(), BLOCK=BLOCK)


def weight_norm_backward(
    direction: Tensor, gain: Tensor, norms: Tensor, gradient: Tensor, of_direction: Tensor, of_gain: Tensor
) -> None:
    """The gradients of v and g."""
    size = direction[0].numel()
    _weight_norm_backward[(len(gain),)](direction, gain, norms, gradient, of_direction, of_gain, size, BLOCK=BLOCK)
