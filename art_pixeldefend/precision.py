"""Numerical precision of PyTorch's operations, whatever the caller has set for other code."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.backends import cuda, cudnn, mkldnn

# The precision settings of the operations, in the newer of PyTorch's two interfaces: the older one (`allow_tf32`)
# raises errors where a user has chosen the newer one; the newer one reads and restores what was set through either.
OPERATIONS = (cudnn.conv, cuda.matmul, mkldnn.conv, mkldnn.matmul)  # type: ignore[attr-defined]  # made at run time
EXACT = ("ieee", "none")
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")

_lock = threading.Lock()
_inside = 0
_found: list[str] = []


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 operations in float32 for the duration of the context: no TF32, no bfloat16, no autocast.

    PyTorch's convolutions on NVIDIA GPUs use TF32 by default, with a mantissa of 10 bits instead of 23, and matrix
    products do where the user has allowed it. Such errors would decide between levels that are nearly equally likely.

    Autocast is a setting of the calling thread; the others are settings of the process, which the last thread to leave
    the context restores.
    """
    global _inside
    with _lock:
        if not _inside:
            _found[:] = [operation.fp32_precision for operation in OPERATIONS]
            for operation, found in zip(OPERATIONS, _found, strict=True):
                if found not in EXACT:
                    operation.fp32_precision = "ieee"
        _inside += 1
    try:
        with ExitStack() as stack:
            for device in AUTOCAST_DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for operation, found in zip(OPERATIONS, _found, strict=True):
                    _restore(operation, found)


@contextmanager
def default_float32() -> Iterator[None]:
    """Make float32 the type of new floating-point tensors, in the whole process, for the duration of the context."""
    found = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(found)


def _restore(operation, found: str) -> None:
    if operation.fp32_precision == found:
        return
    operation.fp32_precision = "none"  # inherit the setting that the operations share; keep that if it is the one found
    if operation.fp32_precision != found:
        operation.fp32_precision = found


def bf16_pays(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
