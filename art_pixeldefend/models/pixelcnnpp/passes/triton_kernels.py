"""The operations of :mod:`~art_pixeldefend.models.pixelcnnpp.passes.fused` on a GPU, as Triton kernels.

Tensors are float32 or bfloat16 in the channels-last layout; sums are float32. With ``TRITON_INTERPRET=1`` in the
environment the kernels run on a CPU as well, slowly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

STEPS = 1 << 16  # dropout probabilities are multiples of 1 / STEPS: one 32-bit hash serves two numbers
BLOCK = 1024  # numbers per program


class Dropout(NamedTuple):
    """A dropout: numbers with a hash below ``threshold`` are dropped, the others multiplied by ``scale``."""

    threshold: int
    scale: float
    seeds: Tensor  # two, on the GPU, so that a CUDA graph draws new ones whenever it is launched


def new_dropout(probability: float, like: Tensor) -> Dropout:
    """A dropout with seeds from PyTorch's generator."""
    threshold = min(round(probability * STEPS), STEPS - 1)
    return Dropout(threshold, STEPS / (STEPS - threshold), torch.randint(1 << 31, (2,), device=like.device))


@triton.jit
def _hash(number, seeds):
    """32 pseudo-random bits for a number, given two seeds: the hash "lowbias32"."""
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
    x, y, seeds, count, threshold, scale,
    F: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PADDED_H: tl.constexpr, PADDED_W: tl.constexpr,
    LEFT: tl.constexpr, TOP: tl.constexpr, DROPOUT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    position, c = i // F, i % F
    column, row, n = (
        position % PADDED_W - LEFT,
        position // PADDED_W % PADDED_H - TOP,
        position // (PADDED_W * PADDED_H),
    )
    inside = (i < count) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    source = ((n * H + row) * W + column) * F + c
    up, down = elus(tl.load(x + source, mask=inside, other=0).to(tl.float32))
    if DROPOUT:
        h = _hash(source, seeds)
        up = tl.where((h & 0xFFFF) >= threshold, up * scale, 0.0)
        down = tl.where((h >> 16) >= threshold, down * scale, 0.0)
    target = y + position * (2 * F) + c
    tl.store(target, up.to(y.dtype.element_ty), mask=i < count)
    tl.store(target + F, down.to(y.dtype.element_ty), mask=i < count)


@triton.jit
def _concat_elu_backward(
    y, gradient, result, seeds, count, threshold, scale,
    F: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PADDED_H: tl.constexpr, PADDED_W: tl.constexpr,
    LEFT: tl.constexpr, TOP: tl.constexpr, DROPOUT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    position, c = i // F, i % F
    column, row, n = position % W + LEFT, position // W % H + TOP, position // (W * H)
    padded = ((n * PADDED_H + row) * PADDED_W + column) * (2 * F) + c
    # elu' = 1 + elu where elu is negative
    up = scale + tl.minimum(tl.load(y + padded, mask=mask, other=0).to(tl.float32), 0.0)
    down = scale + tl.minimum(tl.load(y + padded + F, mask=mask, other=0).to(tl.float32), 0.0)
    up *= tl.load(gradient + padded, mask=mask, other=0).to(tl.float32)
    down *= tl.load(gradient + padded + F, mask=mask, other=0).to(tl.float32)
    if DROPOUT:
        h = _hash(i, seeds)
        up = tl.where((h & 0xFFFF) >= threshold, up, 0.0)
        down = tl.where((h >> 16) >= threshold, down, 0.0)
    tl.store(result + i, (up - down).to(result.dtype.element_ty), mask=mask)


@triton.jit
def _gate(x, ab, y, count, F: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    at = ab + i // F * (2 * F) + i % F
    a, b = tl.load(at, mask=mask, other=0).to(tl.float32), tl.load(at + F, mask=mask, other=0).to(tl.float32)
    value = tl.load(x + i, mask=mask, other=0).to(tl.float32) + a * sigmoid(b)
    tl.store(y + i, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _gate_backward(ab, gradient, result, count, F: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    at = i // F * (2 * F) + i % F
    g = tl.load(gradient + i, mask=mask, other=0).to(tl.float32)
    a = tl.load(ab + at, mask=mask, other=0).to(tl.float32)
    s = sigmoid(tl.load(ab + at + F, mask=mask, other=0).to(tl.float32))
    tl.store(result + at, (g * s).to(result.dtype.element_ty), mask=mask)
    tl.store(result + at + F, (g * a * s * (1 - s)).to(result.dtype.element_ty), mask=mask)


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


def concat_elu(x: Tensor, y: Tensor, padding: tuple[int, int, int, int], dropout: Dropout | None) -> None:
    """``y`` (N, 2 F, H', W') = concat_elu of ``x`` (N, F, H, W), padded with zeros."""
    threshold, scale, seeds = dropout or (0, 1.0, x)
    count = y.numel() // 2
    _concat_elu[_programs(count)](
        x, y, seeds, count, threshold, scale, *_shape(x, y, padding), dropout is not None, BLOCK=BLOCK
    )


def concat_elu_backward(
    y: Tensor, gradient: Tensor, result: Tensor, padding: tuple[int, int, int, int], dropout: Dropout | None
) -> None:
    """``result`` (N, F, H, W) = gradient of the input, given the output ``y`` and its gradient."""
    threshold, scale, seeds = dropout or (0, 1.0, y)
    count = result.numel()
    _concat_elu_backward[_programs(count)](
        y,
        gradient,
        result,
        seeds,
        count,
        threshold,
        scale,
        *_shape(result, y, padding),
        dropout is not None,
        BLOCK=BLOCK,
    )


def gate(x: Tensor, ab: Tensor, y: Tensor) -> None:
    """``y`` = ``x`` + a sigmoid(b)."""
    _gate[_programs(x.numel())](x, ab, y, x.numel(), x.shape[1], BLOCK=BLOCK)


def gate_backward(ab: Tensor, gradient: Tensor, result: Tensor) -> None:
    """``result`` = gradient of ``ab``."""
    _gate_backward[_programs(gradient.numel())](ab, gradient, result, gradient.numel(), gradient.shape[1], BLOCK=BLOCK)


def weight_norm(direction: Tensor, gain: Tensor, norms: Tensor, weight: Tensor) -> None:
    """``weight`` = g v / |v|, and |v| into ``norms``."""
    _weight_norm[(len(gain),)](direction, gain, norms, weight, direction[0].numel(), BLOCK=BLOCK)


def weight_norm_backward(
    direction: Tensor, gain: Tensor, norms: Tensor, gradient: Tensor, of_direction: Tensor, of_gain: Tensor
) -> None:
    """``of_direction`` and ``of_gain`` = gradients of v and g."""
    size = direction[0].numel()
    _weight_norm_backward[(len(gain),)](direction, gain, norms, gradient, of_direction, of_gain, size, BLOCK=BLOCK)
