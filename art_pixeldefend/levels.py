"""ART's images and ours: any range and either layout on one side, 8-bit levels in NCHW on the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOP = 255
PIECE = 2**22  # values that are converted at a time: each takes 24 bytes meanwhile


def check_clip_values(value: Any) -> tuple[float, float]:
    """(minimum, maximum) as two floats. Arrays, as ART allows them, must hold one value each.

    Raises:
        ValueError: naming ``clip_values``.
    """
    try:
        low, high = (np.unique(np.asarray(end, dtype=float)) for end in value)
        if low.size == high.size == 1 and np.isfinite([low[0], high[0]]).all() and low[0] < high[0]:
            return float(low[0]), float(high[0])
    except (TypeError, ValueError):
        pass
    raise ValueError(f"clip_values must be two finite numbers (minimum, maximum), minimum first, got {value!r}")


class Images:
    """The way between images and levels.

    Args:
        image_shape: (C, H, W) of the density model.
        clip_values: (minimum, maximum): levels 0 and 255.
    """

    def __init__(self, image_shape: tuple[int, int, int], clip_values: tuple[float, float]) -> None:
        self.image_shape, (self.low, self.high) = image_shape, clip_values

    @staticmethod
    def as_tensor(x: Any) -> Tensor:
        """An array as a tensor.

        Raises:
            ValueError: naming ``x``, if it is no array of numbers.
        """
        x = np.asarray(x)
        if x.dtype.kind not in "fiu":
            raise ValueError(f"x must be an array of numbers, got dtype {x.dtype}")
        # Torch knows no foreign byte orders, no longdouble, few unsigned integers, and warns of read-only arrays.
        kept = x.dtype.isnative and x.dtype.name in ("float16", "float32", "uint8", "int8", "int16", "int32", "int64")
        return torch.from_numpy(np.array(x, dtype=None if kept else np.float64))

    def to_levels(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) or (N, H, W, C) as the nearest levels (N, C, H, W), uint8.

        Raises:
            ValueError: naming ``x``: a wrong shape, NaN or infinity, or values more than half a level outside
                ``clip_values``.
        """
        x = self._nchw(x)
        if x.dtype == torch.uint8 and (self.low, self.high) == (0, TOP):
            return x
        return _in_pieces(self._nearest, x, torch.empty(x.shape, dtype=torch.uint8, device=x.device))

    def _nearest(self, x: Tensor) -> Tensor:
        """Levels of some images, as :meth:`to_levels`."""
        levels = (x.double() - self.low) * (TOP / (self.high - self.low))
        if levels.numel():
            least, most = levels.min().item(), levels.max().item()
            if not np.isfinite([least, most]).all():
                raise ValueError("x must be finite, got NaN or infinity")
            if least < -0.5 or most > TOP + 0.5:
                got = f"{x.min().item():g} to {x.max().item():g}"
                raise ValueError(f"x must be within clip_values ({self.low:g}, {self.high:g}), got {got}")
        return levels.round().clamp(0, TOP).to(torch.uint8)

    def from_levels(self, levels: Tensor, like: Tensor) -> Tensor:
        """Levels (N, C, H, W) as images of the layout, dtype and device of ``like``."""

        def values(some: Tensor) -> Tensor:
            exact = some.double() / TOP * (self.high - self.low) + self.low
            return exact if like.is_floating_point() else exact.round()

        result = _in_pieces(values, levels, torch.empty(levels.shape, dtype=like.dtype, device=like.device))
        return result if self._is_nchw(like) else result.movedim(1, -1)

    def _nchw(self, x: Tensor) -> Tensor:
        channels, height, width = self.image_shape
        if x.ndim == 4 and self._is_nchw(x):
            return x
        if x.ndim == 4 and tuple(x.shape[1:]) == (height, width, channels):
            return x.movedim(-1, 1)
        nchw, nhwc = f"(N, {channels}, {height}, {width})", f"(N, {height}, {width}, {channels})"
        raise ValueError(f"x must be of shape {nchw} or {nhwc}, the density model's, got {tuple(x.shape)}")

    def _is_nchw(self, x: Tensor) -> bool:
        return tuple(x.shape[1:]) == tuple(self.image_shape)


def _in_pieces(function: Callable[[Tensor], Tensor], x: Tensor, result: Tensor) -> Tensor:
    """``function`` of ``x`` (N, ...) written into ``result``, a few images at a time."""
    count = max(1, PIECE // math.prod(x.shape[1:]))
    for some, into in zip(x.split(count), result.split(count), strict=True):
        into.copy_(function(some))
    return result
