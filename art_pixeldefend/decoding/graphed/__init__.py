"""The cached engine's walk on an NVIDIA GPU, as CUDA graphs with kernels of our own between the matrix products.

Launching a kernel takes several times as long as the work of most of them. A walk launches some hundred at every pixel,
and the same ones again eight rows later: they are captured the first time. What was captured is kept for a model's last
batch sizes, with its memory, for as long as the model lives and its weights stay as they are.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from art_pixeldefend.decoding.graphed.recording import Recording
from art_pixeldefend.density import PixelCNNpp

__all__ = ["decode"]

KEPT = 2  # recordings of a model: of whole batches, and of what is left at the end

_recordings: WeakKeyDictionary[PixelCNNpp, list[Recording]] = WeakKeyDictionary()


@torch.inference_mode()
def decode(pixel_cnn: PixelCNNpp, x: Tensor, eps: int) -> Tensor:
    """Purified levels (N, C, H, W) of levels ``x``."""
    return _decode(pixel_cnn, x, eps) if len(x) else x


def _decode(pixel_cnn: PixelCNNpp, x: Tensor, eps: int) -> Tensor:
    kept = _recordings.setdefault(pixel_cnn, [])
    recording = next((r for r in kept if r.fits(pixel_cnn, len(x), eps)), None)
    if recording is None:
        while len(kept) >= KEPT:
            kept.pop()
        recording = Recording(pixel_cnn, len(x), eps)
    elif recording in kept:
        kept.remove(recording)
    kept.insert(0, recording)
    return recording.decode(x)
