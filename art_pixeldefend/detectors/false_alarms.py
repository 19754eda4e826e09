"""Realised false-alarm rates of a detector on clean images that its calibration did not use."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from art_pixeldefend.detectors.conformal_detector import ConformalDetector
from art_pixeldefend.validation import check_count


@dataclass(frozen=True)
class FalseAlarms:
    """How many clean images were flagged at one level.

    Args:
        alpha: the level.
        counts: images flagged in each random split (splits,).
        tested: images tested in each split; the others calibrated the detector.
        interval: central 95% interval of the number flagged of ``tested`` images if each is flagged with probability
            ``alpha``: binomial.
        split_interval: the same interval where the calibration images of a split are random, too: beta-binomial, for
            p-values that are uniform. It is the wider one.
    """

    alpha: float
    counts: np.ndarray
    tested: int
    interval: tuple[int, int]
    split_interval: tuple[int, int]

    @property
    def rate(self) -> float:
        """The share of images flagged, a mean over splits."""
        return float(self.counts.mean()) / self.tested

    @property
    def inside(self) -> float:
        """The share of the splits within ``split_interval``."""
        low, high = self.split_interval
        return float(((self.counts >= low) & (self.counts <= high)).mean())


def false_alarms(
    detector: ConformalDetector, alphas: Sequence[float] = (0.01, 0.05, 0.1), splits: int = 20, seed: int = 0
) -> list[FalseAlarms]:
    """Calibrate a detector on random halves of its calibration images, and count how many of the others it flags.

    No image is scored again.

    Args:
        detector: a fitted detector.
        alphas: levels; those too small for half of the images are left out.
        splits: the number of random splits into halves.
        seed: of the splits, and of random ties.

    Raises:
        ValueError: if the detector has not been fitted.

    Example:
        >>> from art_pixeldefend import datasets
        >>> from art_pixeldefend.detectors import Likelihood
        >>> detector = ConformalDetector(Likelihood("digits"), clip_values=(0, 255))
        >>> detector.fit(datasets.load("digits").x_test)
        >>> [0.03 < found.rate < 0.07 for found in false_alarms(detector, [0.05])]
        [True]
    """
    detector._check_fitted()
    scores, splits = detector.calibration_scores, check_count("splits", splits)
    assert scores is not None
    half = len(scores) // 2
    possible = [alpha for alpha in alphas if half and detector._least_p_value(half) <= alpha]
    rng, tested = np.random.default_rng(seed), len(scores) - half
    counts = np.zeros((splits, len(possible)), int)
    for split in counts:
        order = rng.permutation(len(scores))
        part = copy.copy(detector)
        part.calibration_scores = scores[order[:half]]
        ties = rng.random((tested, scores.shape[1] + 1)) if detector._breaks_ties else None
        p_values = part._p_values(scores[order[half:]], ties)["p_values"]
        split[:] = [(p_values <= alpha).sum() for alpha in possible]
    return [
        FalseAlarms(alpha, counts[:, i], tested, _binomial(tested, alpha), _beta_binomial(tested, alpha, half))
        for i, alpha in enumerate(possible)
    ]


def _binomial(count: int, alpha: float) -> tuple[int, int]:
    low, high = stats.binom.interval(0.95, count, alpha)
    return int(low), int(high)


def _beta_binomial(count: int, alpha: float, calibration: int) -> tuple[int, int]:
    rank = math.floor(alpha * (calibration + 1) + 1e-9)
    if rank > calibration:
        return count, count
    low, high = stats.betabinom.interval(0.95, count, rank, calibration + 1 - rank)
    return int(low), int(high)
