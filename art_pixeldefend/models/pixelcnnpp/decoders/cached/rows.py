"""Rows of activations, and what is done to them, step by step.

Activations have the shape (columns, feature maps, images), so that the taps of a convolution in one row are one run of
feature maps, and a convolution is a matrix product for each row of its kernel. In memory images come last, next to
each other, which makes long loops of what is done to each feature map; a few images come first, which makes matrices
of a stretch.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 8  # images, of a thread, from about which on pixels are faster than whole rows: benchmarks/README.md


def are_few(images: int) -> bool:
    """Do they leave PyTorch little to do at a pixel?"""
    return images <= FEW


class Memory:
    """Rows of ``count`` images, on the device and of the dtype of ``like``."""

    def __init__(self, like: Tensor, count: int) -> None:
        self.like, self.count = like, count
        self._taken: list[Tensor] = []

    def rows(self, rows: int, width: int, features: int) -> Tensor:
        """Zeros (rows, width, features, images): in memory, few images come first, and many last."""
        if are_few(self.count):
            zeros = self.like.new_zeros(self.count, rows, width, features).movedim(0, -1)
        else:
            zeros = self.like.new_zeros(rows, width, features, self.count)
        self._taken.append(zeros)
        return zeros

    def clear(self) -> None:
        """Zeros everywhere again."""
        torch._foreach_zero_(self._taken)


def windows(row: Tensor, first: int, count: int, taps: int = 1, stride: int = 1) -> Tensor:
    """(W, F, N) to (count, taps F, N): at each position so many neighbouring columns, the first ones from ``first``."""
    column, feature, image = row.stride()
    shape = (count, taps * row.shape[1], row.shape[2])
    return row[first:].as_strided(shape, (stride * column, feature, image))


class Steps:
    """Calls of PyTorch on given memory, to be made again and again: a walk meets each of them at every fourth row.

    Slicing tensors makes several times as many calls as what is done to the slices, and at each of them threads wait
    for one another.
    """

    def __init__(self) -> None:
        self.calls: list[partial] = []

    def run(self) -> None:
        """Make the calls."""
        for call in self.calls:
            call()

    def contract(self, sums: Tensor, weight: Tensor, x: Tensor, out: Tensor) -> None:
        """``out`` (n, F', N) = ``sums``, or what expands to it, + ``weight`` (F', F) times ``x`` (n, F, N)."""
        if x.stride(1) == 1:  # images first
            sums, x, out = sums.permute(2, 0, 1), x.permute(2, 0, 1), out.permute(2, 0, 1)
            self.calls.append(partial(torch.baddbmm, sums, x, weight.t().expand(len(x), -1, -1), out=out))
        elif len(x) == 1:
            self.calls.append(partial(torch.addmm, sums[0], weight, x[0], out=out[0]))
        else:
            self.calls.append(partial(torch.baddbmm, sums, weight.expand(len(x), -1, -1), x, out=out))

    def concat_elu(self, x: Tensor, out: Tensor) -> None:
        """elu(x) and elu(-x), one above the other, into ``out`` (n, 2 F, N), whose upper half ``x`` may be."""
        upper, lower = out.chunk(2, dim=1)
        if upper.data_ptr() != x.data_ptr():
            self.calls.append(partial(upper.copy_, x))
        self.calls += [partial(torch.neg, upper, out=lower), partial(F.elu_, out)]

    def gate(self, x: Tensor, ab: Tensor, out: Tensor, active: Tensor) -> None:
        """``out`` = ``x`` + a sigmoid(b), a and b one above the other, and its concat_elu; b is overwritten."""
        a, b = ab.chunk(2, dim=1)
        self.calls += [partial(b.sigmoid_), partial(torch.addcmul, x, a, b, out=out)]
        self.concat_elu(out, active)
