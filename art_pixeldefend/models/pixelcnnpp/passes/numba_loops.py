"""The operations of :mod:`~art_pixeldefend.models.pixelcnnpp.passes.fused` on a CPU, as loops compiled by Numba.

Each loop is compiled for one number of feature maps, because the compiler vectorises loops of known length best, and
for float32 or bfloat16, which is passed as its bits in uint16 and computed in float32. The loops take addresses,
because wrapping a tensor in a NumPy array takes longer than the shortest of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp.compilation import jit

STEPS = 1 << 16  # dropout probabilities are multiples of 1 / STEPS: one 32-bit hash serves two numbers

Dropout = tuple[np.uint32, np.float32, np.uint32, np.uint32]  # threshold of the hashes, scale, two seeds
Padding = tuple[int, int, int, int]  # left, right, top, bottom

_f, _i, _u = np.float32, np.int32, np.uint32


@intrinsic
def _bits(context, x):
    return types.int32(types.float32), lambda _, builder, signature, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _float(context, bits):
    return types.float32(types.int32), lambda _, builder, signature, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def pointer(context, address):
    """An address as a pointer, for ``numba.carray``."""
    return types.voidptr(types.int64), lambda context, builder, signature, args: builder.inttoptr(
        args[0], context.get_value_type(types.voidptr)
    )


# Numbers in memory are float32, or bfloat16 as bits. These are overloads, not arguments of the functions that make the
# loops, because Numba's cache on disk fails for a loop with another compiled function in its closure.


def _load(number):
    """The number as float32."""


def _store(x, number):
    """The float32 number ``x`` in the type of ``number``."""


def _minus(number):
    """The number with its sign changed, in its own type."""


@overload(_load, inline="always")
def _(number):
    if number == types.uint16:
        return lambda number: _float(_i(_i(number) << _i(16)))
    return lambda number: number


@overload(_store, inline="always")
def _(x, number):
    # Rounded to nearest, ties away from zero: one operation less than ties to even. It could carry into the sign of a
    # NaN whose lower bits are set. NaN in bfloat16 have none; weight_loops, which reads float32, takes care of it.
    if number == types.uint16:
        return lambda x, number: np.uint16(_i(_bits(x) + _i(0x8000)) >> _i(16))
    return lambda x, number: _f(x)


@overload(_minus, inline="always")
def _(number):
    if number == types.uint16:
        return lambda number: np.uint16(number ^ np.uint16(0x8000))
    return lambda number: -number


NUMBERS = {torch.float32: np.float32, torch.bfloat16: np.uint16}


@njit(inline="always")
def exp(x):
    """exp of x <= 0 to two units in the last place, by the polynomial of the Cephes library."""
    x = _f(-87.0) if x < _f(-87.0) else x  # in this order NaN stays NaN
    n = np.floor(x * _f(1.4426950408889634) + _f(0.5))
    r = x - n * _f(0.693359375) + n * _f(2.12194440e-4)
    p = _f(1.9875691500e-4)
    p = p * r + _f(1.3981999507e-3)
    p = p * r + _f(8.3334519073e-3)
    p = p * r + _f(4.1665795894e-2)
    p = p * r + _f(1.6666665459e-1)
    p = p * r + _f(5.0000001201e-1)
    return (p * r * r + r + _f(1.0)) * _float((_i(n) + _i(127)) << _i(23))


@njit(inline="always")
def _sigmoid(x):
    e = exp(-abs(x))
    return (_f(1.0) if x > _f(0.0) else e) / (_f(1.0) + e)


@njit(inline="always")
def _hash(number, seed, other_seed):
    """32 pseudo-random bits for a number, given two seeds: the hash "lowbias32"."""
    h = _u(_u(number) * _u(other_seed | _u(1)) + seed)
    h = _u((h ^ (h >> _u(16))) * _u(0x7FEB352D))
    h = _u((h ^ (h >> _u(15))) * _u(0x846CA68B))
    return _u(h ^ (h >> _u(16)))


@njit(inline="always")
def _views(x, y, size, padding, filters, number):
    n, height, width = size
    left, right, top, bottom = padding
    return (
        carray(pointer(x), (n, height, width, filters), number),
        carray(pointer(y), (n, top + height + bottom, left + width + right, 2 * filters), number),
    )


@njit(inline="always")
def _zero_frame(y, size, padding, number):
    n, height, width = size
    left, _right, top, _bottom = padding
    for image in range(n):
        for i in range(y.shape[1]):
            if i < top or i >= top + height:
                y[image, i] = number(0)
            else:
                y[image, i, :left] = number(0)
                y[image, i, left + width :] = number(0)


class ActivationLoops(NamedTuple):
    """Compiled for one number of feature maps F and one dtype.

    Arguments are addresses of x (N, H, W, F), of concat_elu(x) with its padding (N, H', W', 2 F), and of their
    gradients; the size (N, H, W); the padding (left, right, top, bottom); and a dropout: (threshold of the hashes below
    which a number is dropped, factor of the others, two seeds).
    """

    concat_elu: Callable  # x, y, size, padding
    concat_elu_backward: Callable  # y, gradient of y, gradient of x, size, padding
    concat_elu_dropout: Callable  # the same with dropout: .., dropout
    concat_elu_dropout_backward: Callable
    gate: Callable  # x, (a, b), y, pixels
    gate_backward: Callable  # (a, b), gradient of y, gradient of (a, b), pixels


@lru_cache
def activation_loops(filters: int, dtype: torch.dtype) -> ActivationLoops:
    """Compile the loops for activations of ``filters`` feature maps."""
    number = NUMBERS[dtype]
    compiled = jit(fastmath={"contract"})

    @compiled
    def concat_elu(x, y, size, padding):
        x, y = _views(x, y, size, padding, filters, number)
        _zero_frame(y, size, padding, number)
        left, top = padding[0], padding[2]
        for n in range(size[0]):
            for i in range(size[1]):
                for j in range(size[2]):
                    source, target = x[n, i, j], y[n, top + i, left + j]
                    for c in range(filters):
                        v = _load(source[c])
                        e = _store(exp(-abs(v)) - _f(1.0), source[c])
                        target[c] = source[c] if v > _f(0.0) else e
                        target[filters + c] = e if v > _f(0.0) else _minus(source[c])

    @compiled
    def concat_elu_backward(y, gradient, result, size, padding):
        result, gradient = _views(result, gradient, size, padding, filters, number)
        _, y = _views(0, y, size, padding, filters, number)
        left, top = padding[0], padding[2]
        for n in range(size[0]):
            for i in range(size[1]):
                for j in range(size[2]):
                    source, g, target = y[n, top + i, left + j], gradient[n, top + i, left + j], result[n, i, j]
                    for c in range(filters):
                        # elu' = 1 + elu where elu is negative
                        up = _load(g[c]) * (_f(1.0) + min(_load(source[c]), _f(0.0)))
                        down = _load(g[filters + c]) * (_f(1.0) + min(_load(source[filters + c]), _f(0.0)))
                        target[c] = _store(up - down, target[c])

    @compiled
    def concat_elu_dropout(x, y, size, padding, dropout):
        x, y = _views(x, y, size, padding, filters, number)
        _zero_frame(y, size, padding, number)
        left, top = padding[0], padding[2]
        threshold, scale, seed, other_seed = dropout
        for n in range(size[0]):
            for i in range(size[1]):
                for j in range(size[2]):
                    source, target = x[n, i, j], y[n, top + i, left + j]
                    first = ((n * size[1] + i) * size[2] + j) * filters
                    for c in range(filters):
                        v = _load(source[c])
                        e = exp(-abs(v)) - _f(1.0)
                        h = _hash(first + c, seed, other_seed)
                        up, down = (v if v > _f(0.0) else e) * scale, (e if v > _f(0.0) else -v) * scale
                        target[c] = _store(up if (h & _u(0xFFFF)) >= threshold else _f(0.0), target[c])
                        target[filters + c] = _store(
                            down if (h >> _u(16)) >= threshold else _f(0.0), target[filters + c]
                        )

    @compiled
    def concat_elu_dropout_backward(y, gradient, result, size, padding, dropout):
        result, gradient = _views(result, gradient, size, padding, filters, number)
        _, y = _views(0, y, size, padding, filters, number)
        left, top = padding[0], padding[2]
        threshold, scale, seed, other_seed = dropout
        for n in range(size[0]):
            for i in range(size[1]):
                for j in range(size[2]):
                    source, g, target = y[n, top + i, left + j], gradient[n, top + i, left + j], result[n, i, j]
                    first = ((n * size[1] + i) * size[2] + j) * filters
                    for c in range(filters):
                        h = _hash(first + c, seed, other_seed)
                        up = _load(g[c]) * (scale + min(_load(source[c]), _f(0.0)))
                        down = _load(g[filters + c]) * (scale + min(_load(source[filters + c]), _f(0.0)))
                        up = up if (h & _u(0xFFFF)) >= threshold else _f(0.0)
                        down = down if (h >> _u(16)) >= threshold else _f(0.0)
                        target[c] = _store(up - down, target[c])

    @compiled
    def gate(x, ab, y, pixels):
        x, y = carray(pointer(x), (pixels, filters), number), carray(pointer(y), (pixels, filters), number)
        ab = carray(pointer(ab), (pixels, 2, filters), number)
        for p in range(pixels):
            for c in range(filters):
                y[p, c] = _store(_load(x[p, c]) + _load(ab[p, 0, c]) * _sigmoid(_load(ab[p, 1, c])), y[p, c])

    @compiled
    def gate_backward(ab, gradient, result, pixels):
        gradient = carray(pointer(gradient), (pixels, filters), number)
        ab = carray(pointer(ab), (pixels, 2, filters), number)
        result = carray(pointer(result), (pixels, 2, filters), number)
        for p in range(pixels):
            for c in range(filters):
                g, s = _load(gradient[p, c]), _sigmoid(_load(ab[p, 1, c]))
                result[p, 0, c] = _store(g * s, result[p, 0, c])
                result[p, 1, c] = _store(g * _load(ab[p, 0, c]) * s * (_f(1.0) - s), result[p, 1, c])

    return ActivationLoops(
        concat_elu, concat_elu_backward, concat_elu_dropout, concat_elu_dropout_backward, gate, gate_backward
    )


@lru_cache
def weight_loops(dtype: torch.dtype) -> tuple[Callable, Callable]:
    """Compile weight normalisation, and its gradients, of weights (O, R) in ``dtype`` from float32 parameters."""
    number = NUMBERS[dtype]
    compiled = jit(fastmath={"contract", "reassoc"})

    @compiled
    def forward(direction, gain, norms, weight, size):
        direction, weight = carray(pointer(direction), size, _f), carray(pointer(weight), size, number)
        gain, norms = carray(pointer(gain), size[0], _f), carray(pointer(norms), size[0], _f)
        for o in range(size[0]):
            total = _f(0.0)
            for i in range(size[1]):
                total += direction[o, i] * direction[o, i]
            norms[o] = np.sqrt(max(total, _f(1e-24)))
            factor = gain[o] / norms[o]
            for i in range(size[1]):
                w = direction[o, i] * factor
                weight[o, i] = _store(w if w == w else _f(np.nan), weight[o, i])

    @compiled
    def backward(direction, gain, norms, gradient, of_direction, of_gain, size):
        direction, gradient = carray(pointer(direction), size, _f), carray(pointer(gradient), size, number)
        gain, norms = carray(pointer(gain), size[0], _f), carray(pointer(norms), size[0], _f)
        of_direction, of_gain = carray(pointer(of_direction), size, _f), carray(pointer(of_gain), size[0], _f)
        for o in range(size[0]):
            total = _f(0.0)
            for i in range(size[1]):
                total += _load(gradient[o, i]) * direction[o, i]
            of_gain[o] = total / norms[o]
            factor, along = gain[o] / norms[o], total / (norms[o] * norms[o])
            for i in range(size[1]):
                of_direction[o, i] = (_load(gradient[o, i]) - direction[o, i] * along) * factor

    return forward, backward


# The operations on tensors in the channels-last layout


def new_dropout(probability: float, like: Tensor) -> Dropout:
    """A dropout with seeds from PyTorch's generator."""
    threshold = min(round(probability * STEPS), STEPS - 1)
    seeds = torch.randint(1 << 32, (2,)).tolist()
    return np.uint32(threshold), np.float32(STEPS / (STEPS - threshold)), np.uint32(seeds[0]), np.uint32(seeds[1])


def concat_elu(x: Tensor, y: Tensor, padding: Padding, dropout: Dropout | None) -> None:
    """``y`` (N, 2 F, H', W') = concat_elu of ``x`` (N, F, H, W), padded with zeros."""
    loops, size = activation_loops(x.shape[1], x.dtype), (len(x), *x.shape[2:])
    if dropout:
        loops.concat_elu_dropout(x.data_ptr(), y.data_ptr(), size, padding, dropout)
    else:
        loops.concat_elu(x.data_ptr(), y.data_ptr(), size, padding)


def concat_elu_backward(y: Tensor, gradient: Tensor, result: Tensor, padding: Padding, dropout: Dropout | None) -> None:
    """``result`` (N, F, H, W) = gradient of the input, given the output ``y`` and its gradient."""
    loops, size = activation_loops(result.shape[1], y.dtype), (len(result), *result.shape[2:])
    addresses = (y.data_ptr(), gradient.data_ptr(), result.data_ptr())
    if dropout:
        loops.concat_elu_dropout_backward(*addresses, size, padding, dropout)
    else:
        loops.concat_elu_backward(*addresses, size, padding)


def gate(x: Tensor, ab: Tensor, y: Tensor) -> None:
    """``y`` = ``x`` + a sigmoid(b)."""
    filters = x.shape[1]
    activation_loops(filters, x.dtype).gate(x.data_ptr(), ab.data_ptr(), y.data_ptr(), x.numel() // filters)


def gate_backward(ab: Tensor, gradient: Tensor, result: Tensor) -> None:
    """``result`` = gradient of ``ab``."""
    filters = gradient.shape[1]
    backward = activation_loops(filters, ab.dtype).gate_backward
    backward(ab.data_ptr(), gradient.data_ptr(), result.data_ptr(), gradient.numel() // filters)


def weight_norm(direction: Tensor, gain: Tensor, norms: Tensor, weight: Tensor) -> None:
    """``weight`` = g v / |v|, and |v| into ``norms``."""
    size = len(direction), direction.numel() // len(direction)
    weight_loops(weight.dtype)[0](*(x.data_ptr() for x in (direction, gain, norms, weight)), size)


def weight_norm_backward(
    direction: Tensor, gain: Tensor, norms: Tensor, gradient: Tensor, of_direction: Tensor, of_gain: Tensor
) -> None:
    """``of_direction`` and ``of_gain`` = gradients of v and g."""
    size = len(direction), direction.numel() // len(direction)
    tensors = (direction, gain, norms, gradient, of_direction, of_gain)
    weight_loops(gradient.dtype)[1](*(x.data_ptr() for x in tensors), size)
