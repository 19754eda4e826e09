"""A hash of a model's parameters, at the speed of reading them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor, nn

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.kernels import SOURCES
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.vectors import floats_at

MANY = 1 << 21  # parameters from which on a second thread is worth its start, 0.15 ms


def _compile(sources: int) -> Callable:
    @njit(error_model="numpy", nogil=True, cache=True)
    def checksums(addresses, counts):
        """Four pairs of 64 bits: a sum of the numbers, and the sum of that sum as it grows (Fletcher 1982)."""
        _ = sources
        zero = np.uint64(0)
        a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
        for piece in range(len(addresses)):
            bits = carray(floats_at(addresses[piece]), counts[piece]).view(np.uint32)
            whole = len(bits) // 4 * 4
            for i in range(0, whole, 4):
                a0, a1 = a0 + np.uint64(bits[i]), a1 + np.uint64(bits[i + 1])
                a2, a3 = a2 + np.uint64(bits[i + 2]), a3 + np.uint64(bits[i + 3])
                b0, b1, b2, b3 = b0 + a0, b1 + a1, b2 + a2, b3 + a3
            for i in range(whole, len(bits)):
                a0 += np.uint64(bits[i])
                b0 += a0
        return np.array([a0, a1, a2, a3, b0, b1, b2, b3])

    return checksums


checksums = _compile(SOURCES)


def fingerprint(pixel_cnn: PixelCNNpp) -> bytes:
    """Of the values of all parameters, in single precision on the CPU, where they lie."""
    # Elements in one piece of memory; the order of the axes in it does not matter.
    tensors = [p if p.is_contiguous() or _whole(p) else p.detach().contiguous() for p in _parameters(pixel_cnn)]
    addresses = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
    counts = np.array([tensor.numel() for tensor in tensors], dtype=np.int64)
    # Always the same two parts, whoever adds them up.
    middle = int(np.searchsorted(np.cumsum(counts), counts.sum() // 2))
    parts = [(addresses[:middle], counts[:middle]), (addresses[middle:], counts[middle:])]
    if counts.sum() < MANY or torch.get_num_threads() == 1:
        sums = [checksums(*part) for part in parts]
    else:
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(checksums, *parts[1])
            sums = [checksums(*parts[0]), other.result()]
    return b"".join(part.tobytes() for part in sums)


def _parameters(module: nn.Module) -> list[Tensor]:
    """Those of ``module.parameters()``, in another order: with hundreds of modules the generators behind it add up."""
    found: list[Tensor | None] = []
    todo: list[nn.Module | None] = [module]
    while todo:
        if (one := todo.pop()) is not None:
            found += one._parameters.values()
            todo += one._modules.values()
    return [parameter for parameter in found if parameter is not None]


def _whole(tensor: Tensor) -> bool:
    """Is it all that its memory holds?"""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
