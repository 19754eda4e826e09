"""Split-conformal p-values: the rank of an image's score among the scores of calibration images."""

from __future__ import annotations

import math

import numpy as np


def conformal_p_values(scores: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    """(1 + number of calibration scores >= score) / (N + 1), for each score (Vovk et al. 2005).

    For a score that is exchangeable with the N calibration scores, the probability of a p-value of at most alpha is at
    most alpha, for every alpha.

    Args:
        scores: (M,), higher meaning more anomalous. NaN counts as higher than any number.
        calibration: the calibration scores (N,), in any order.

    Returns:
        p-values (M,) in 1 / (N + 1) ... 1.

    Example:
        >>> conformal_p_values(np.array([0.5, 3.5, np.nan]), np.array([1.0, 2.0, 3.0, 4.0])).tolist()
        [1.0, 0.4, 0.2]
    """
    ranked = np.sort(calibration)
    at_least = len(ranked) - np.searchsorted(ranked, np.where(np.isnan(scores), np.inf, scores), side="left")
    return (1 + np.where(np.isnan(scores), 0, at_least)) / (len(ranked) + 1)


def least_calibration_images(alpha: float) -> int:
    """The least number N of calibration images for which a p-value, at least 1 / (N + 1), can reach ``alpha`` > 0."""
    near = math.ceil(1 / alpha)
    return next(count for count in (near - 2, near - 1, near) if count >= 1 and 1 / (count + 1) <= alpha)  # as rounded
