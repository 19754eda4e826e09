"""Levels and balls: what one of 256 levels is in an estimator's units, and how far an attack may go."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from art_pixeldefend.levels import LEVELS, from_levels, to_levels


def level(estimator: Any) -> float:
    """One 8-bit level in the units of an estimator's clip values: 1/255 of their range.

    Raises:
        ValueError: if the estimator has no clip values, or they differ from feature to feature.
    """
    low, high = scalar_clip_values(estimator)
    return (high - low) / (LEVELS - 1)


def scalar_clip_values(estimator: Any) -> tuple[float, float]:
    """An estimator's clip values as two numbers.

    Raises:
        ValueError: if it has none, or they differ from feature to feature.
    """
    if estimator.clip_values is None:
        raise ValueError("estimator must have clip_values, so that a level is known")
    low, high = (np.unique(value) for value in estimator.clip_values)
    if len(low) != 1 or len(high) != 1:
        raise ValueError("estimator must have the same clip_values for every feature")
    return float(low[0]), float(high[0])


def bim_steps(eps: float) -> int:
    """Iterations of BIM at a radius of ``eps`` levels (Kurakin et al. 2017, arXiv:1607.02533)."""
    return math.floor(min(eps + 4, 1.25 * eps))


def clip_to_ball(attacked: np.ndarray, x: np.ndarray, eps: int, clip_values: tuple[float, float]) -> np.ndarray:
    """``attacked`` on the 8-bit grid, at most ``eps`` levels from ``x``; both in the units of ``clip_values``."""
    centre = to_levels(x, clip_values).astype(np.int16)
    levels = np.clip(to_levels(attacked, clip_values).astype(np.int16), centre - eps, centre + eps)
    return from_levels(levels, clip_values, x.dtype)


def round_outwards(attacked: np.ndarray, x: np.ndarray, clip_values: tuple[float, float]) -> np.ndarray:
    """``attacked`` with every change from ``x`` a whole number of levels, no smaller than it was."""
    low, high = clip_values
    one = (high - low) / (LEVELS - 1)
    change = (attacked - x) / one
    whole = np.sign(change) * np.ceil(np.abs(change) - 1e-3)  # what is a whole number but for rounding stays
    return np.clip(x + whole * one, low, high).astype(x.dtype)
