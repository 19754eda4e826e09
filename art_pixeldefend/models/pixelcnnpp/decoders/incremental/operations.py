"""Operations on fixed memory, recorded once and executed many times."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


class Operations:
    """A list of PyTorch calls on given tensors.

    Slicing the tensors takes several times as many calls as the work on the slices; recording takes it out of the loop.
    All tensors are (n, features, N): columns, feature maps, images.
    """

    def __init__(self) -> None:
        self.calls: list[partial] = []

    def run(self) -> None:
        """Execute the operations."""
        for call in self.calls:
            call()

    def contract(self, sums: Tensor, weight: Tensor, x: Tensor, out: Tensor) -> None:
        """``out`` (n, F', N) = ``sums`` (or a bias that broadcasts) + ``weight`` (F', F) times ``x`` (n, F, N)."""
        if x.stride(1) == 1:  # images come first
            sums, x, out = sums.permute(2, 0, 1), x.permute(2, 0, 1), out.permute(2, 0, 1)
            self.calls.append(partial(torch.baddbmm, sums, x, weight.t().expand(len(x), -1, -1), out=out))
        elif len(x) == 1:
            self.calls.append(partial(torch.addmm, sums[0], weight, x[0], out=out[0]))
        else:
            self.calls.append(partial(torch.baddbmm, sums, weight.expand(len(x), -1, -1), x, out=out))

    def concat_elu(self, x: Tensor, out: Tensor) -> None:
        """``out`` (n, 2 F, N) = elu(x) and elu(-x) along the features; ``x`` may be the first half of ``out``."""
        upper, lower = out.chunk(2, dim=1)
        if upper.data_ptr() != x.data_ptr():
            self.calls.append(partial(upper.copy_, x))
        self.calls += [partial(torch.neg, upper, out=lower), partial(F.elu_, out)]

    def store(self, sums: Tensor, plain: Tensor, active: Tensor) -> None:
        """``plain`` = ``sums``, which are the same memory here, and ``active`` = their concat_elu."""
        self.concat_elu(plain, active)

    def gate(self, x: Tensor, ab: Tensor, plain: Tensor, active: Tensor) -> None:
        """``plain`` = ``x`` + a sigmoid(b) for (a, b) = ``ab``, which is overwritten; ``active`` = its concat_elu."""
        a, b = ab.chunk(2, dim=1)
        self.calls += [partial(b.sigmoid_), partial(torch.addcmul, x, a, b, out=plain)]
        self.concat_elu(plain, active)
