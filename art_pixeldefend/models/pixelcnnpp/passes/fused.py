"""Fused operations for training: concat_elu with dropout and padding, the gate, and weight normalisation.

Each is one pass over memory forward and one backward. (PyTorch's own dropout on a CPU draws its numbers one by one,
which takes longer than the convolutions.) They are for float32 and bfloat16 tensors in the channels-last layout, with
Numba on a CPU (``numba_loops``) and Triton on an NVIDIA GPU (``triton_kernels``); ``layers`` has the formulas for all
other tensors.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from art_pixeldefend.models.pixelcnnpp.compilation import has_numba

Padding = tuple[int, int, int, int]  # left, right, top, bottom
DTYPES = (torch.float32, torch.bfloat16)


@lru_cache
def _passes(device: str) -> Any:
    """The module with the passes for a type of device, or None where Numba or Triton is missing."""
    try:
        if device == "cpu" and has_numba():
            from art_pixeldefend.models.pixelcnnpp.passes import numba_loops as loops

            return loops
        if device == "cuda":
            from art_pixeldefend.models.pixelcnnpp.passes import triton_kernels as kernels

            return kernels
    except ImportError:
        pass
    return None


def applies(*tensors: Tensor) -> bool:
    """Whether the functions of this module can be used for these tensors."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    dtype, device = tensors[0].dtype, tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():  # where Triton would launch
        return False
    known = dtype in DTYPES and all(x.device == device and x.stride(1) == 1 and x.dtype == dtype for x in tensors)
    return known and _passes(device.type) is not None


def concat_elu(x: Tensor, dropout: float = 0.0, padding: Padding = (0, 0, 0, 0)) -> Tensor:
    """pad(dropout(elu([x, -x]))): (N, F, H, W) to (N, 2 F, top + H + bottom, left + W + right)."""
    return _ConcatElu.apply(x, dropout, padding)


def gate(x: Tensor, ab: Tensor) -> Tensor:
    """x + a sigmoid(b) for x (N, F, H, W) and ab (N, 2 F, H, W), a and b stacked along the channels."""
    return _Gate.apply(x, ab)


def weight_norm(direction: Tensor, gain: Tensor) -> Tensor:
    """g v / |v| for v (O, I, H, W) and g (O,), float32; under autocast in its data type."""
    device = direction.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else direction.dtype
    if dtype not in DTYPES:
        dtype = direction.dtype
    return _WeightNorm.apply(direction, gain, dtype)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, filters: int, height: int, width: int) -> Tensor:
    """Uninitialised memory of the batch size, data type and device of ``x``."""
    shape = (len(x), filters, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


class _ConcatElu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: float, padding: Padding) -> Tensor:
        x, passes = _channels_last(x), _passes(x.device.type)
        _, filters, height, width = x.shape
        y = _empty(x, 2 * filters, height + padding[2] + padding[3], width + padding[0] + padding[1])
        ctx.options = padding, passes.new_dropout(dropout, x) if dropout else None
        ctx.shape = filters, height, width
        passes.concat_elu(x, y, *ctx.options)
        ctx.save_for_backward(y)  # the convolution that follows keeps it anyway
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        gradient, result = _channels_last(gradient), _empty(y, *ctx.shape)
        _passes(y.device.type).concat_elu_backward(y, gradient, result, *ctx.options)
        return result, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ab: Tensor) -> Tensor:
        x, ab = _channels_last(x), _channels_last(ab)
        y = torch.empty_like(x)
        _passes(x.device.type).gate(x, ab, y)
        ctx.save_for_backward(ab)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (ab,) = ctx.saved_tensors
        gradient, result = _channels_last(gradient), torch.empty_like(ab)
        _passes(ab.device.type).gate_backward(ab, gradient, result)
        return gradient, result


class _WeightNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, direction: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
        weight, norms = torch.empty_like(direction, dtype=dtype), torch.empty_like(gain)
        _passes(direction.device.type).weight_norm(direction, gain, norms, weight)
        ctx.save_for_backward(direction, gain, norms)
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        direction, gain, norms = ctx.saved_tensors
        results = torch.empty_like(direction), torch.empty_like(gain)
        passes = _passes(direction.device.type)
        passes.weight_norm_backward(direction, gain, norms, _channels_last(gradient), *results)
        return *results, None
