"""What a training step computes between its convolutions, on a CPU: one pass over memory each, forward and backward.

Torch takes seven passes for a concat_elu with dropout, and draws the dropout's numbers one by one; that took more time
than the convolutions. These functions apply to float32 and bfloat16 in the channels-last layout where gradients are
wanted and Numba is there; elsewhere the formulas of :mod:`~art_pixeldefend.density.layers` are left to torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Padding = tuple[int, int, int, int]  # left, right, top, bottom
DTYPES = (torch.float32, torch.bfloat16)


@lru_cache
def _loops() -> Any:
    """Numba's side, or None without Numba; loaded when a model is first trained."""
    try:
        from art_pixeldefend.density import loops
    except ImportError:
        return None
    return loops


def applies(*tensors: Tensor) -> bool:
    """Whether the functions of this module are for such tensors."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    dtype = tensors[0].dtype
    known = dtype in DTYPES and all(x.device.type == "cpu" and x.stride(1) == 1 and x.dtype == dtype for x in tensors)
    return known and _loops() is not None


def concat_elu(x: Tensor, dropout: float = 0.0, padding: Padding = (0, 0, 0, 0)) -> Tensor:
    """dropout(elu([x, -x])) with zeros around it: (N, F, H, W) to (N, 2 F, top + H + bottom, left + W + right)."""
    return _ConcatElu.apply(x, dropout, padding)


def gate(x: Tensor, ab: Tensor) -> Tensor:
    """x + a sigmoid(b) of x (N, F, H, W) and (a, b), (N, 2 F, H, W)."""
    return _Gate.apply(x, ab)


def weight_norm(direction: Tensor, gain: Tensor) -> Tensor:
    """g v / |v| for v (O, I, H, W) and g (O,), float32; of the dtype of autocast inside it."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else direction.dtype
    if dtype not in DTYPES:
        dtype = direction.dtype
    return _WeightNorm.apply(direction, gain, dtype)


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, filters: int, height: int, width: int) -> Tensor:
    """Room beside ``x``."""
    return torch.empty((len(x), filters, height, width), dtype=x.dtype, memory_format=torch.channels_last)


def _chance(probability: float) -> tuple[np.uint32, np.float32, np.uint32, np.uint32]:
    """A dropout as the loops want it."""
    chances = _loops().CHANCES
    drop = round(probability * chances)
    seeds = torch.randint(1 << 32, (2,)).tolist()  # of torch's generator: its seed determines the run
    return np.uint32(drop), np.float32(chances / (chances - drop)), np.uint32(seeds[0]), np.uint32(seeds[1])


class _ConcatElu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: float, padding: Padding) -> Tensor:
        x = _laid_out(x)
        n, filters, height, width = x.shape
        y = _empty(x, 2 * filters, height + padding[2] + padding[3], width + padding[0] + padding[1])
        compiled, size = _loops().activation_loops(filters, x.dtype), (n, height, width)
        if dropout:
            ctx.how = size, padding, _chance(dropout)
            compiled.dropped(x.data_ptr(), y.data_ptr(), *ctx.how)
        else:
            ctx.how = size, padding
            compiled.concat_elu(x.data_ptr(), y.data_ptr(), *ctx.how)
        ctx.save_for_backward(y)  # which the convolution after it keeps as well
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        gradient, result = _laid_out(gradient), _empty(y, y.shape[1] // 2, *ctx.how[0][1:])
        compiled = _loops().activation_loops(result.shape[1], y.dtype)
        backward = compiled.dropped_backward if len(ctx.how) == 3 else compiled.concat_elu_backward
        backward(y.data_ptr(), gradient.data_ptr(), result.data_ptr(), *ctx.how)
        return result, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ab: Tensor) -> Tensor:
        x, ab = _laid_out(x), _laid_out(ab)
        y = torch.empty_like(x)
        filters = x.shape[1]
        _loops().activation_loops(filters, x.dtype).gate(
            x.data_ptr(), ab.data_ptr(), y.data_ptr(), x.numel() // filters
        )
        ctx.save_for_backward(ab)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (ab,) = ctx.saved_tensors
        gradient, result = _laid_out(gradient), torch.empty_like(ab)
        filters = gradient.shape[1]
        backward = _loops().activation_loops(filters, ab.dtype).gate_backward
        backward(ab.data_ptr(), gradient.data_ptr(), result.data_ptr(), gradient.numel() // filters)
        return gradient, result


class _WeightNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, direction: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
        weight, norms = torch.empty_like(direction, dtype=dtype), torch.empty_like(gain)
        size = len(direction), direction.numel() // len(direction)
        forward = _loops().weight_loops(dtype)[0]
        forward(direction.data_ptr(), gain.data_ptr(), norms.data_ptr(), weight.data_ptr(), size)
        ctx.save_for_backward(direction, gain, norms)
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        direction, gain, norms = ctx.saved_tensors
        gradient = _laid_out(gradient)
        results = torch.empty_like(direction), torch.empty_like(gain)
        size = len(direction), direction.numel() // len(direction)
        backward = _loops().weight_loops(gradient.dtype)[1]
        backward(*(x.data_ptr() for x in (direction, gain, norms, gradient, *results)), size)
        return *results, None
