"""float32 that is float32: no TF32 or bfloat16 inside products of float32 numbers.

Torch's convolutions on NVIDIA GPUs use TF32 unless told otherwise, with 10 bits instead of 23, and its matrix products
where the user allowed it. Near ties between levels would then be decided by an error a thousand times that of float32.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.backends import cuda, cudnn, mkldnn

# Each operation's own setting, of the newer of torch's two interfaces: the older one (`allow_tf32`) raises errors where
# users chose the newer one, while this one reads and restores what was set through either.
OPERATIONS = (cudnn.conv, cuda.matmul, mkldnn.conv, mkldnn.matmul)  # type: ignore[attr-defined]  # made at run time
EXACT = ("ieee", "none")

_lock = threading.Lock()
_inside = 0
_found: list[str] = []


@contextmanager
def full_float32() -> Iterator[None]:
    """Full precision inside, then what the user had set: settings are the process's, the last one out restores them."""
    global _inside
    with _lock:
        if not _inside:
            _found[:] = [operation.fp32_precision for operation in OPERATIONS]
            for operation, found in zip(OPERATIONS, _found, strict=True):
                if found not in EXACT:
                    operation.fp32_precision = "ieee"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for operation, found in zip(OPERATIONS, _found, strict=True):
                    _restore(operation, found)


def _restore(operation, found: str) -> None:
    if operation.fp32_precision == found:
        return
    operation.fp32_precision = "none"  # what all of them share is then seen: should it be what was found, leave it so
    if operation.fp32_precision != found:
        operation.fp32_precision = found


def bf16_pays(device: torch.device) -> bool:
    """Whether ``device`` multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
