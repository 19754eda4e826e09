"""Memory for rows of activations.

Activations have the shape (columns, feature maps, images), so that neighbouring columns of a row are one run of numbers
and a convolution is one matrix product per row of its kernel. In memory the images come last, which makes elementwise
operations on one column long loops; in small batches they come first, which makes one matrix of several columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL_BATCH = 8  # images up to which whole rows are faster than single columns: benchmarks/README.md


def small_batch(images: int) -> bool:
    """Whether a batch is too small to amortise PyTorch's overhead per operation at every pixel."""
    return images <= SMALL_BATCH


class Memory:
    """Zero-initialised memory for the activations of a batch.

    Args:
        like: a tensor of the device and data type to use.
        count: images in the batch, N.
    """

    def __init__(self, like: Tensor, count: int) -> None:
        self.like, self.count = like, count
        self._allocated: list[Tensor] = []

    def rows(self, rows: int, width: int, features: int) -> Tensor:
        """Activations (rows, width, features, N)."""
        if small_batch(self.count):
            zeros = self.like.new_zeros(self.count, rows, width, features).movedim(0, -1)
        else:
            zeros = self.like.new_zeros(rows, width, features, self.count)
        self._allocated.append(zeros)
        return zeros

    def sums(self, width: int, features: int) -> Tensor:
        """Results of matrix products, (width, features, N)."""
        return self.rows(1, width, features)[0]

    def staging(self, rows: Tensor, features: int) -> Tensor:
        """Memory for the sums that the first ``features`` maps of ``rows`` are made from: these maps themselves."""
        return rows[:, :, :features]

    def clear(self) -> None:
        """Set everything to zero."""
        torch._foreach_zero_(self._allocated)


def windows(row: Tensor, first: int, count: int, taps: int = 1, stride: int = 1) -> Tensor:
    """Receptive fields in a row (W, F, N): ``taps`` columns at every ``stride``-th position from column ``first`` on.

    Returns:
        A view (count, taps F, N).
    """
    column, feature, image = row.stride()
    shape = (count, taps * row.shape[1], row.shape[2])
    return row[first:].as_strided(shape, (stride * column, feature, image))
