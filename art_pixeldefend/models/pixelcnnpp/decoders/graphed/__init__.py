"""The incremental engine for NVIDIA GPUs: CUDA graphs, with Triton kernels between the matrix products.

Decoding launches some hundred small kernels at every pixel, and the same ones again eight rows later. The graphs of a
model's latest batch sizes are kept, with their memory, while the model exists and its weights do not change.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.decoders.graphed.capture import CapturedDecoder

__all__ = ["graphed_decode"]

KEPT = 2  # decoders per model: for whole batches, and for the remainder

_lock = threading.Lock()
_decoders: WeakKeyDictionary[PixelCNNpp, list[CapturedDecoder]] = WeakKeyDictionary()


@torch.inference_mode()
def graphed_decode(pixel_cnn: PixelCNNpp, x: Tensor, eps: int) -> Tensor:
    """Purified levels (N, C, H, W) of levels ``x``."""
    if not len(x):
        return x
    with torch.cuda.device_of(x):  # where Triton launches
        return _decoder(pixel_cnn, len(x), eps).decode(x)


def _decoder(pixel_cnn: PixelCNNpp, count: int, eps: int) -> CapturedDecoder:
    with _lock:
        kept = _decoders.setdefault(pixel_cnn, [])
        decoder = next((d for d in kept if d.fits(pixel_cnn, count, eps)), None)
        if decoder is not None:
            kept.remove(decoder)
        else:
            del kept[KEPT - 1 :]  # free its memory before allocating
            decoder = CapturedDecoder(pixel_cnn, count, eps)
        kept.insert(0, decoder)
        return decoder
