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
from art_pixeldefend.models.pixelcnnpp.decoders.weights import Snapshot

GROUP = 8  # most images that are decoded in lockstep

_lock = threading.Lock()
_programs: WeakKeyDictionary[PixelCNNpp, tuple[Snapshot, Program]] = WeakKeyDictionary()


def program_of(pixel_cnn: PixelCNNpp) -> Program:
    """The program of a model with its current weights, kept while the model exists and its weights do not change."""
    with _lock:
        if pixel_cnn in _programs:
            snapshot, program = _programs[pixel_cnn]
            if snapshot.matches(pixel_cnn):
                return program
        program = Program(pixel_cnn)
        _programs[pixel_cnn] = Snapshot(pixel_cnn), program
        return program


@torch.no_grad()
def compiled_decode(pixel_cnn: PixelCNNpp, x: Tensor, eps: int) -> Tensor:
    """Purified levels (N, C, H, W) of levels ``x``, in as many threads as PyTorch uses.

    A thread needs ``Program.stride`` bytes for each of the images, at most GROUP, that it decodes at a time.

    Raises:
        ValueError: if the network's outputs are not finite.
    """
    levels = x.cpu().contiguous().numpy()
    purified = np.empty_like(levels)
    if not len(levels):
        return x.clone()
    program, threads = program_of(pixel_cnn), torch.get_num_threads()
    size = min(GROUP, -(-len(levels) // threads))
    groups = [slice(first, first + size) for first in range(0, len(levels), size)]

    def decode(group: slice) -> bool:
        caches = np.zeros(len(levels[group]) * program.stride // FLOAT, dtype=np.float32)
        tables = program.instructions, program.row_bounds, program.column_bounds
        memory = program.weights.ctypes.data, program.layout, caches.ctypes.data, program.stride
        return decode_group(product, *tables, *memory, levels[group], eps, purified[group])

    if len(groups) == 1:
        finite = [decode(groups[0])]
    else:
        with ThreadPoolExecutor(min(threads, len(groups))) as pool:
            finite = list(pool.map(decode, groups))
    if not all(finite):
        raise not_finite()
    return torch.from_numpy(purified).to(x.device)
