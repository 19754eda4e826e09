"""Apply a function to many images, batch by batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm


def map_batches(
    function: Callable[[Tensor], Tensor], x: Tensor, batch_size: int, *, verbose: bool = False, what: str = ""
) -> Tensor:
    """Apply ``function`` to batches of at most ``batch_size`` images of ``x`` (N, ...) and concatenate the results.

    A batch that does not fit into memory is tried again at half the size, and so are all batches after it.

    Args:
        function: maps a batch (M, ...) to a tensor of M results; called once, with M 0, if ``x`` is empty.
        x: the images.
        batch_size: images per batch.
        verbose: show a progress bar.
        what: label of the progress bar.

    Raises:
        MemoryError, torch.OutOfMemoryError: if a single image does not fit.
    """
    results: list[Tensor] = []
    start = 0
    with tqdm(total=len(x), unit="image", desc=what, disable=not verbose) as bar:
        while start < len(x) or not results:
            batch = x[start : start + batch_size]
            try:
                results.append(function(batch))
            except (MemoryError, RuntimeError) as error:
                if len(batch) <= 1 or not _is_out_of_memory(error):
                    raise
                batch_size = (len(batch) + 1) // 2
                continue
            start += len(batch)
            bar.update(len(batch))
    return torch.cat(results)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; on CPUs torch raises a plain RuntimeError with one of these texts."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error) or "not enough memory" in str(error)
