"""The cached engine's walk on an NVIDIA GPU, as CUDA graphs with kernels of our own between the matrix products.

A walk launches some hundred small kernels at every pixel, and the same ones again eight rows later: they are captured
the first time. What was captured is kept for a model's last batch sizes, with its memory, for as long as the model
lives and its weights stay as they are.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.decoders.graphed.recording import Recording

__all__ = ["decode"]

KEPT = 2  # recordings of a model: of whole batches, and of what is left at the end

_keeping = threading.Lock()
_recordings: WeakKeyDictionary[PixelCNNpp, list[Recording]] = WeakKeyDictionary()


@torch.inference_mode()
def decode(pixel_cnn: PixelCNNpp, x: Tensor, eps: int) -> Tensor:
    """Purified levels (N, C, H, W) of levels ``x``."""
    if not len(x):
        return x
    with torch.cuda.device_of(x):  # where Triton launches
        return _recording(pixel_cnn, len(x), eps).decode(x)


def _recording(pixel_cnn: PixelCNNpp, count: int, eps: int) -> Recording:
    with _keeping:
        kept = _recordings.setdefault(pixel_cnn, [])
        recording = next((r for r in kept if r.fits(pixel_cnn, count, eps)), None)
        if recording is not None:
            kept.remove(recording)
        else:
            del kept[KEPT - 1 :]  # before its memory is asked for
            recording = Recording(pixel_cnn, count, eps)
        kept.insert(0, recording)
        return recording
