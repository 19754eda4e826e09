"""Work in pieces that fit into memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm


def map_batches(
    function: Callable[[Tensor], Tensor], x: Tensor, batch_size: int, *, verbose: bool = False, what: str = ""
) -> Tensor:
    """``function`` of ``x`` (N, ...) in pieces of at most ``batch_size`` images, put together again.

    A piece that does not fit into memory is tried again at half the size, and so are those after it.

    Raises:
        MemoryError, torch.OutOfMemoryError: if even a single image does not fit.
    """
    results: list[Tensor] = []
    start = 0
    with tqdm(total=len(x), unit="image", desc=what, disable=not verbose) as bar:
        while start < len(x) or not results:
            piece = x[start : start + batch_size]
            try:
                results.append(function(piece))
            except (MemoryError, RuntimeError) as error:
                if len(piece) <= 1 or not _is_out_of_memory(error):
                    raise
                batch_size = (len(piece) + 1) // 2
                continue
            start += len(piece)
            bar.update(len(piece))
    return torch.cat(results)


def _is_out_of_memory(error: Exception) -> bool:
    """Torch has a class for this on GPUs only; a CPU allocation that fails is a RuntimeError with this text."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error) or "not enough memory" in str(error)
