"""Distributes the images of a batch over threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.instructions import FLOAT, Program
from art_pixeldefend.models.pixelcnnpp.decoders.compiled.interpreter import decode_group, product
from art_pixeldefend.models.pixelcnnpp.decoders.rules import not_finite
from art_pixeldefend.models.pixelcnnpp.decoders.snapshot import Snapshot

GROUP = 8  # most images that are decoded in lockstep

_lock = threading.Lock()
_programs: WeakKeyDictionary[PixelCNNpp, tuple[Snapshot, Program]] = WeakKeyDictionary()


@torch.no_grad()
def compiled_decode(pixel_cnn: PixelCNNpp, x: Tensor, eps: int) -> Tensor:
    """Purified levels (N, C, H, W) of levels ``x``, in as many threads as PyTorch uses.

    The program of a model is kept while the model exists and its weights do not change. A thread needs
    ``Program.stride`` bytes for each of the images, at most GROUP, that it decodes at a time.

    Raises:
        ValueError: if the network's outputs are not finite.
    """
    levels = x.cpu().contiguous().numpy()
    with _lock:
        kept = _programs.get(pixel_cnn)
    unchanged = False
    if kept is not None and len(levels) == 1:  # comparing the weights takes a tenth of the time: it is done meanwhile
        with ThreadPoolExecutor(1) as pool:
            comparison = pool.submit(kept[0].matches, pixel_cnn)
            purified = _execute(kept[1], levels, eps)
            unchanged = comparison.result()
    elif kept is not None and kept[0].matches(pixel_cnn):
        purified, unchanged = _execute(kept[1], levels, eps), True
    if not unchanged:
        made = Snapshot(pixel_cnn), Program(pixel_cnn)
        with _lock:
            _programs[pixel_cnn] = made
        purified = _execute(made[1], levels, eps)
    if purified is None:
        raise not_finite()
    return torch.from_numpy(purified).to(x.device)


def _execute(program: Program, levels: np.ndarray, eps: int) -> np.ndarray | None:
    """Purified levels (N, C, H, W), or None if the network's outputs are not finite."""
    purified, threads = np.empty_like(levels), torch.get_num_threads()
    size = max(1, min(GROUP, -(-len(levels) // threads)))
    groups = [slice(first, first + size) for first in range(0, len(levels), size)]

    def decode(group: slice) -> bool:
        caches = np.zeros(len(levels[group]) * program.stride // FLOAT, dtype=np.float32)
        tables = program.instructions, program.row_bounds, program.column_bounds
        memory = program.weights.ctypes.data, program.layout, caches.ctypes.data, program.stride
        return decode_group(product, *tables, *memory, levels[group], eps, purified[group])

    if len(groups) <= 1:
        finite = [decode(group) for group in groups]
    else:
        with ThreadPoolExecutor(min(threads, len(groups))) as pool:
            finite = list(pool.map(decode, groups))
    return purified if all(finite) else None
