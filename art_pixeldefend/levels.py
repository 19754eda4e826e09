"""Conversion of images between their own range and layout, and [0, 1] or 8-bit levels in NCHW."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

LEVELS = 256
TOP = LEVELS - 1
PIECE = 2**22  # values converted at a time: each takes 24 bytes during the conversion
FAR = 10.0  # ranges: values farther outside clip_values cannot be those of images in that range

ClipValues: TypeAlias = tuple[float, float] | tuple[np.ndarray, np.ndarray]
UNIT = (0.0, 1.0)


def check_clip_values(value: Any) -> ClipValues:
    """Return (minimum, maximum) as two floats, or as two float64 arrays if they differ between channels or pixels.

    Raises:
        ValueError: naming ``clip_values``.
    """
    try:
        low, high = (np.array(end, dtype=np.float64) for end in value)
        if np.isfinite(low).all() and np.isfinite(high).all() and low.size and high.size and (low < high).all():
            if low.min() == low.max() and high.min() == high.max():
                return float(low.flat[0]), float(high.flat[0])
            return low, high
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"clip_values must be two finite numbers or arrays (minimum, maximum), minimum first, got {value!r}"
    )


def as_tensor(x: Any) -> Tensor:
    """Copy an array, or nested sequences of numbers, to a tensor.

    Raises:
        ValueError: naming ``x``, if it is not an array of numbers.
    """
    try:
        x = np.asarray(x)
    except ValueError:  # nested sequences of different lengths
        raise ValueError("x must be an array of numbers, all images of one shape") from None
    if x.dtype.kind not in "fiu":
        raise ValueError(f"x must be an array of numbers, got dtype {x.dtype}")
    # torch has no foreign byte orders, no longdouble and few unsigned integers, and warns of read-only arrays.
    kept = x.dtype.isnative and x.dtype.name in ("float16", "float32", "uint8", "int8", "int16", "int32", "int64")
    return torch.from_numpy(np.array(x, dtype=None if kept else np.float64))


@overload
def to_levels(x: np.ndarray, clip_values: ClipValues = UNIT) -> np.ndarray: ...
@overload
def to_levels(x: Tensor, clip_values: ClipValues = UNIT) -> Tensor: ...
def to_levels(x: Any, clip_values: Any = UNIT) -> Any:
    """Round values to the nearest of 256 levels, uint8; values outside ``clip_values`` are clipped."""
    if not isinstance(x, Tensor):
        return to_levels(as_tensor(x), clip_values).numpy()
    low, high = clip_values
    return _in_pieces(
        lambda some: ((some.double() - low) * (TOP / (high - low))).round_().clamp_(0, TOP), x, torch.uint8
    )


@overload
def from_levels(levels: np.ndarray, clip_values: ClipValues = UNIT, dtype: Any = None) -> np.ndarray: ...
@overload
def from_levels(levels: Tensor, clip_values: ClipValues = UNIT, dtype: Any = None) -> Tensor: ...
def from_levels(levels: Any, clip_values: Any = UNIT, dtype: Any = None) -> Any:
    """Convert levels to values in ``clip_values``, of ``dtype`` (default: float32), rounded for integer types."""
    if not isinstance(levels, Tensor):
        wanted = np.dtype(dtype or np.float32)
        values = from_levels(as_tensor(levels), clip_values, torch.float64).numpy()
        return (np.rint(values) if wanted.kind in "iu" else values).astype(wanted)
    low, high = clip_values
    dtype = dtype or torch.float32

    def values_of(some: Tensor) -> Tensor:
        values = some.double() / TOP * (high - low) + low
        return values if dtype.is_floating_point else values.round_()

    return _in_pieces(values_of, levels, dtype)


class Images:
    """Converts users' images to [0, 1] or to levels in NCHW, and back.

    Args:
        image_shape: (C, H, W) that images must have, which also tells NCHW from NHWC; None for any shape.
        clip_values: (minimum, maximum) of the images, as checked by :func:`check_clip_values`. Arrays broadcast over
            an image in its own layout; an array of C values holds one for each channel in either layout.
        channels_first: the layout, where ``image_shape`` is None. None takes images for NHWC if their last axis has 1
            or 3 entries and their second one has not, and for NCHW otherwise.

    Example:
        >>> images = Images((1, 2, 2), (0.0, 1.0))
        >>> images.to_levels(torch.tensor([[[[0.0, 0.5], [0.75, 1.0]]]])).tolist()
        [[[[0, 128], [191, 255]]]]
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] | None,
        clip_values: ClipValues = UNIT,
        channels_first: bool | None = None,
    ) -> None:
        self.image_shape, self.clip_values, self.channels_first = image_shape, clip_values, channels_first

    def check(self, x: Tensor) -> str:
        """Check images, and describe their range if any value is more than half a level outside ``clip_values``.

        Returns:
            The range, with a hint where other ``clip_values`` look right; an empty text if no value is outside.

        Raises:
            ValueError: naming ``x``: a wrong shape or dtype, NaN or infinity, or values more than ten ranges outside
                ``clip_values``; or naming ``clip_values``, if they do not fit the images.
        """
        if x.dtype == torch.bool or x.is_complex():
            raise ValueError(f"x must hold real numbers, got dtype {x.dtype}")
        low, high = self._ends(x)
        if not x.numel() or (x.dtype == torch.uint8 and self.clip_values == (0, TOP)):
            return ""
        x = x.detach()
        if x.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch cannot compare these
            x = x.double()
        extremes = x.aminmax(dim=0) if isinstance(low, Tensor) else x.aminmax()  # the latter is much faster
        ends = [(end.double() - low) / (high - low) for end in extremes]
        least, most = ends[0].min().item(), ends[1].max().item()
        if not (math.isfinite(least) and math.isfinite(most)):
            raise ValueError("x must be finite, got NaN or infinity")
        if least >= -0.5 / TOP and most <= 1 + 0.5 / TOP:
            return ""
        found = f"{x.min().item():g} to {x.max().item():g}"
        if least < -FAR or most > 1 + FAR:
            hint = "for pixels of 0 to 255 pass clip_values=(0, 255)"
            raise ValueError(f"x must be within clip_values {self.shown}, got {found}; {hint}")
        if not isinstance(low, Tensor) and (low, high) == UNIT and -1 <= least < -0.5 and most <= 1:
            found += "; for images in [-1, 1] pass clip_values=(-1, 1)"
        return found

    @property
    def shown(self) -> str:
        """The clip values, for messages."""
        low, high = (np.unique(end) for end in self.clip_values)
        return "(" + ", ".join("/".join(f"{value:g}" for value in end[:4]) for end in (low, high)) + ")"

    def to_unit(self, x: Tensor) -> Tensor:
        """Map ``clip_values`` to 0 and 1, without clipping, as (N, C, H, W) in float64; differentiable."""
        low, high = self._ends(x)
        unit = (x.double() - low) / (high - low)
        return unit if self._is_nchw(x) else unit.movedim(-1, 1)

    def from_unit(self, unit: Tensor, like: Tensor) -> Tensor:
        """Map [0, 1] to ``clip_values``, in the layout, dtype and device of ``like``; differentiable."""
        unit = unit.to(like.device, torch.float64)
        low, high = self._ends(like)
        values = (unit if self._is_nchw(like) else unit.movedim(1, -1)) * (high - low) + low
        return values.to(like.dtype) if like.is_floating_point() else values.round().to(like.dtype)

    def to_levels(self, x: Tensor) -> Tensor:
        """Round images to the nearest levels (N, C, H, W), uint8.

        Raises:
            ValueError: as :meth:`check`, or for values more than half a level outside ``clip_values``.
        """
        if found := self.check(x):
            raise ValueError(f"x must be within clip_values {self.shown}, got {found}")
        bytes_ = x.dtype == torch.uint8 and self.clip_values == (0, TOP)
        levels = x if bytes_ else to_levels(x.detach(), self._ends(x))
        return levels if self._is_nchw(x) else levels.movedim(-1, 1)

    def from_levels(self, levels: Tensor, like: Tensor) -> Tensor:
        """Convert levels (N, C, H, W) to images in the range, layout, dtype and device of ``like``."""
        levels = levels if self._is_nchw(like) else levels.movedim(1, -1)
        return from_levels(levels.to(like.device), self._ends(like), like.dtype)

    def _ends(self, x: Tensor) -> tuple[Any, Any]:
        """Return minimum and maximum as numbers, or as tensors that broadcast over ``x``."""
        nchw = self._is_nchw(x)
        if not isinstance(self.clip_values[0], np.ndarray):
            return self.clip_values

        def end(values: Any) -> Tensor:
            tensor = torch.as_tensor(np.asarray(values), dtype=torch.float64, device=x.device)
            return tensor[:, None, None] if tensor.ndim == 1 and nchw else tensor

        low, high = (end(values) for values in self.clip_values)
        try:
            if torch.broadcast_shapes(low.shape, high.shape, (1, *x.shape[1:])) == (1, *x.shape[1:]):
                return low, high
        except RuntimeError:
            pass
        shapes = f"{tuple(low.shape)} and {tuple(high.shape)}"
        raise ValueError(f"clip_values of shapes {shapes} must broadcast over images of shape {tuple(x.shape[1:])}")

    def _is_nchw(self, x: Tensor) -> bool:
        """Return whether ``x`` is NCHW rather than NHWC.

        Raises:
            ValueError: naming ``x``, if it is neither.
        """
        shape = tuple(x.shape)
        if self.image_shape is None:
            if x.ndim != 4:
                raise ValueError(f"x must be of shape (N, C, H, W) or (N, H, W, C), got {shape}")
            if self.channels_first is not None:
                return self.channels_first
            return not (shape[-1] in (1, 3) and shape[1] not in (1, 3))
        channels, height, width = self.image_shape
        if shape[1:] == (channels, height, width):
            return True
        if x.ndim == 4 and shape[1:] == (height, width, channels):
            return False
        nchw, nhwc = f"(N, {channels}, {height}, {width})", f"(N, {height}, {width}, {channels})"
        raise ValueError(f"x must be of shape {nchw} or {nhwc}, as the model's images, got {shape}")


def _in_pieces(function: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply ``function`` to ``x`` (N, ...), a few images at a time, with a result of ``dtype``."""
    result = torch.empty(x.shape, dtype=dtype, device=x.device)
    count = max(1, PIECE // max(1, math.prod(x.shape[1:])))
    for some, into in zip(x.split(count), result.split(count), strict=True):
        into.copy_(function(some))
    return result
