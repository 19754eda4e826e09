"""8-bit levels in an estimator's units, and clipping to L-infinity balls of whole levels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from art_pixeldefend.levels import LEVELS, from_levels, to_levels


def level(estimator: Any) -> float:
    """Return the size of one 8-bit level in an estimator's units: 1/255 of the range of its clip values.

    Raises:
        ValueError: if the estimator has no clip values, or they differ from feature to feature.
    """
    low, high = scalar_clip_values(estimator)
    return (high - low) / (LEVELS - 1)


def scalar_clip_values(estimator: Any) -> tuple[float, float]:
    """Return an estimator's clip values as two numbers.

    Raises:
        ValueError: if it has none, or they differ from feature to feature.
    """
    if estimator.clip_values is None:
        raise ValueError("estimator must have clip_values, which define the size of a level")
    low, high = (np.unique(value) for value in estimator.clip_values)
    if len(low) != 1 or len(high) != 1:
        raise ValueError("estimator must have the same clip_values for every feature")
    return float(low[0]), float(high[0])


def bim_steps(eps: float) -> int:
    """Return the number of BIM's iterations for a radius of ``eps`` levels (Kurakin et al. 2017, arXiv:1607.02533)."""
    return math.floor(min(eps + 4, 1.25 * eps))


def clip_to_ball(attacked: np.ndarray, x: np.ndarray, eps: int, clip_values: tuple[float, float]) -> np.ndarray:
    """Round ``attacked`` to 8 bits and clip it to ``eps`` levels around ``x``, in the units of ``clip_values``."""
    centre = to_levels(x, clip_values).astype(np.int16)
    levels = np.clip(to_levels(attacked, clip_values).astype(np.int16), centre - eps, centre + eps)
    return from_levels(levels, clip_values, x.dtype)


def round_outwards(attacked: np.ndarray, x: np.ndarray, clip_values: tuple[float, float]) -> np.ndarray:
    """Round every change from ``x`` up to a whole number of levels."""
    low, high = clip_values
    one = (high - low) / (LEVELS - 1)
    change = (attacked - x) / one
    whole = np.sign(change) * np.ceil(np.abs(change) - 1e-3)  # tolerates rounding errors in whole numbers
    return np.clip(x + whole * one, low, high).astype(x.dtype)
