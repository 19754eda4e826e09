"""Split-conformal p-values: the rank of an image's score among the scores of calibration images."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from scipy import optimize, special, stats

COMBINATIONS = ("bonferroni", "harmonic", "cauchy", "joint")
CONDITIONS = ("simes", "dkwm", "monte-carlo")
RATES = ("bh", "storey", "by")
STOREY = 0.5  # p-values above it estimate the share of clean images
SIMULATIONS = 1000  # calibration sets that "monte-carlo" simulates
RANKS = 256  # order statistics of each that it simulates, about
MOST_IMAGES = 2**40  # no search for a number of calibration images goes further
PIECE = 2**22  # comparisons at a time


def conformal_p_values(
    scores: np.ndarray, calibration: np.ndarray, *, two_sided: bool = False, ties: np.ndarray | None = None
) -> np.ndarray:
    """(1 + number of calibration scores >= score) / (N + 1), for each score (Vovk et al. 2005).

    For a score that is exchangeable with the N calibration scores, the probability of a p-value of at most alpha is at
    most alpha, for every alpha. With ``ties`` it is alpha for every multiple alpha of 1 / (N + 1): the p-value is
    uniform.

    Args:
        scores: (M,), higher meaning more anomalous. NaN counts as higher than any number.
        calibration: the calibration scores (N,), in any order.
        two_sided: low scores are anomalous, too: min(1, 2 min(p, 1 - p + 1 / (N + 1))), p being the value above. With
            ``ties`` the probability is alpha for every multiple of 2 / (N + 1).
        ties: random numbers (M,), uniform in [0, 1), that order a score among the calibration scores that equal it.
            Without them all of these count as higher.

    Returns:
        p-values (M,) in 1 / (N + 1) ... 1.

    Example:
        >>> conformal_p_values(np.array([0.5, 3.5, np.nan]), np.array([1.0, 2.0, 3.0, 4.0])).tolist()
        [1.0, 0.4, 0.2]
        >>> conformal_p_values(np.array([0.5, 2.5]), np.array([1.0, 2.0, 3.0, 4.0]), two_sided=True).tolist()
        [0.4, 1.0]
    """
    ranked, nan = np.sort(calibration), np.isnan(scores)
    values = np.where(nan, np.inf, scores)
    at_least = len(ranked) - np.searchsorted(ranked, values, side="left")
    above = len(ranked) - np.searchsorted(ranked, values, side="right")
    equal = at_least - above
    if ties is None:
        rank, from_below = 1 + at_least, 1 + len(ranked) - above
    else:
        rank = 1 + above + np.floor(ties * (equal + 1)).astype(int)
        from_below = len(ranked) + 2 - rank
    if two_sided:
        rank = np.minimum(2 * np.minimum(rank, from_below), len(ranked) + 1)
    return np.where(nan, 1 + two_sided, rank) / (len(ranked) + 1)


def conditional_p_values(p_values: np.ndarray, count: int, delta: float, method: str) -> np.ndarray:
    """Raise conformal p-values so that they hold for most calibration sets, each taken by itself.

    With probability 1 - ``delta`` over the calibration images, the p-values are such that a new clean image has one of
    at most alpha with a probability of at most alpha, for all alpha at once (Bates et al. 2023, arXiv:2104.08279,
    section 4). The rank k becomes the k-th of numbers b_1 <= ... <= b_N that bound the order statistics of N uniform
    numbers simultaneously with that probability.

    Args:
        p_values: conformal p-values, with calibration scores that equal a score counted as higher.
        count: the number N of calibration images.
        delta: the probability of a calibration set for which the p-values do not hold.
        method: the bounds. ``"simes"``: a generalised Simes inequality with N / 2 terms; tight for small p-values.
            ``"dkwm"``: the Dvoretzky-Kiefer-Wolfowitz-Massart inequality; at least sqrt(log(2 / delta) / 2N).
            ``"monte-carlo"``: quantiles of the order statistics at one level, found by simulation; tight everywhere.

    Returns:
        p-values of the shape of ``p_values``, none of them smaller.

    Example:
        >>> conditional_p_values(np.array([0.001, 0.05, 0.5]), 999, delta=0.1, method="monte-carlo").round(3).tolist()
        [0.005, 0.069, 0.548]
    """
    p_values = np.asarray(p_values)
    ranks = np.rint(p_values * (count + 1)).astype(int)
    bounds = np.where(ranks > count, 1.0, _order_statistic_bounds(np.minimum(ranks, count), count, delta, method))
    return np.maximum(bounds, p_values)


def _order_statistic_bounds(ranks: np.ndarray, count: int, delta: float, method: str) -> np.ndarray:
    """Bounds of the order statistics of these ranks; all N hold together with probability 1 - delta."""
    if method == "dkwm":
        return np.minimum(ranks / count + math.sqrt(math.log(2 / delta) / (2 * count)), 1.0)
    if method == "simes":
        return _simes_bounds(ranks, count, delta)
    level, chosen = _level(count, delta)
    chosen_ranks = chosen[np.searchsorted(chosen, ranks)]
    return stats.beta.isf(level, chosen_ranks, count + 1 - chosen_ranks)


def _simes_bounds(ranks: np.ndarray, count: int, delta: float) -> np.ndarray:
    """1 - delta^(1/k) [i (i - 1) ... (i - k + 1) / (N (N - 1) ... (N - k + 1))]^(1/k), i = N + 1 - rank, k = N / 2."""
    terms, i = max(count // 2, 1), count + 1 - ranks
    rest = np.maximum(i - terms, 0)
    logs = special.gammaln(i + 1.0) - special.gammaln(rest + 1.0)
    logs -= special.gammaln(count + 1.0) - special.gammaln(count - terms + 1.0)
    return np.where(i >= terms, -np.expm1((math.log(delta) + logs) / terms), 1.0)


@lru_cache(maxsize=64)
def _level(count: int, delta: float) -> tuple[float, np.ndarray]:
    """The level at which the quantiles of the order statistics bound all of them with probability 1 - delta.

    Returns:
        the level, and the ranks that were simulated, in order; any other is bounded by the next of these.
    """
    chosen = np.unique(np.ceil(np.geomspace(1, count, RANKS)).astype(int))
    chosen = np.union1d(chosen[chosen <= count], np.append(np.arange(1, min(count, RANKS // 4) + 1), count))
    gaps = np.diff(np.append(chosen, count + 1), prepend=0)
    sums = np.cumsum(np.random.default_rng(0).standard_gamma(gaps, (SIMULATIONS, len(gaps))), axis=1)
    least = stats.beta.sf(sums[:, :-1] / sums[:, -1:], chosen, count + 1 - chosen).min(axis=1)
    # Another simulation has a lower minimum than the k-th lowest of these with probability k / (SIMULATIONS + 1).
    return float(np.sort(least)[math.floor(delta * (SIMULATIONS + 1)) - 1]), chosen


def combine_p_values(p_values: np.ndarray, method: str) -> np.ndarray:
    """Combine several p-values of each image into one.

    Args:
        p_values: (M, K), in (0, 1].
        method: - ``"bonferroni"``: K min(p). Valid however the p-values depend on each other.
            - ``"harmonic"``: a K / (1/p_1 + ... + 1/p_K). Valid however they depend on each other, by the least
              constant a for which this holds (Vovk and Wang 2020, arXiv:1212.4966): 2 for K = 2, below e log K.
            - ``"cauchy"``: the tail probability of the mean of tan(pi (1/2 - p)) under the Cauchy distribution (Liu and
              Xie 2020, arXiv:1808.09011). Exact for independent p-values; under dependence an approximation for
              small p-values, which can be too small. A p-value near 1 cancels one near 0.

    Returns:
        (M,), at most 1.

    Example:
        >>> p_values = np.array([[0.01, 0.5, 0.9]])
        >>> [round(float(combine_p_values(p_values, method)[0]), 3) for method in ("bonferroni", "harmonic", "cauchy")]
        [0.03, 0.08, 0.033]
    """
    count = p_values.shape[1]
    if method == "bonferroni":
        combined = count * p_values.min(axis=1)
    elif method == "harmonic":
        combined = harmonic_constant(count) * count / (1 / p_values).sum(axis=1)
    else:
        combined = stats.cauchy.sf(np.tan(np.pi * (0.5 - p_values)).mean(axis=1)) if count > 1 else p_values[:, 0]
    return np.minimum(combined, 1.0)


@lru_cache
def harmonic_constant(count: int) -> float:
    """The least a for which a times the harmonic mean of K p-values is a p-value under any dependence.

        a = inf over z > 0 of (z + K) log(1 + z) / z

    (Vovk and Wang 2020, arXiv:1212.4966). For K of 1 and 2 the infimum is K, at z = 0.
    """
    if count <= 2:
        return float(count)

    def slope(z: float) -> float:
        return z**2 - count * ((z + 1) * math.log1p(z) - z)

    z = optimize.brentq(slope, 1e-3, 10.0 * count**2)
    return (z + count) * math.log1p(z) / z


def q_values_of(p_values: np.ndarray, method: str) -> np.ndarray:
    """The least false discovery rate at which each of a batch of images is flagged.

    Args:
        p_values: of the images (M,).
        method: ``"bh"``: Benjamini-Hochberg; ``"storey"``: the same times Storey's estimate of the share of clean
            images, which may be above 1 (bounded by 1, it would not control the rate); ``"by"``: Benjamini-Yekutieli,
            for p-values of any dependence.

    Returns:
        (M,), at most 1. Flagging those of at most q bounds the expected share of clean images among the flagged by q.

    Example:
        >>> q_values_of(np.array([0.01, 0.02, 0.9, 0.8]), "bh").tolist()
        [0.04, 0.04, 0.9, 0.9]
    """
    if not len(p_values):
        return p_values
    q_values = stats.false_discovery_control(p_values, method="by" if method == "by" else "bh")
    if method != "storey":
        return q_values
    clean = (1 + (p_values > STOREY).sum()) / (len(p_values) * (1 - STOREY))
    return np.minimum(q_values * clean, 1.0)


def flagged_by_rate(p_values: np.ndarray, scores: np.ndarray, q: float, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Flag images of a batch at the false discovery rate ``q``, and those with a score of NaN.

    Args:
        p_values: of the images (M,).
        scores: of the images (M, K).
        q: the false discovery rate.
        method: as for :func:`q_values_of`.

    Returns:
        q-values (M,), and whether an image is flagged (M,).
    """
    q_values = q_values_of(p_values, method)
    return q_values, (q_values <= q) | np.isnan(scores).any(axis=1)


def joint_p_values(
    scores: np.ndarray, calibration: np.ndarray, two_sided: Sequence[bool], ties: np.ndarray | None
) -> np.ndarray:
    """Rank a combined score of an image among the combined scores of the calibration images.

    An image and the N calibration images are ranked together by each score. The combined score is minus the sum over
    scores of the logarithm of the rank, counted from the most anomalous, as in Fisher's method. It treats all N + 1
    images alike, so that its p-value is uniform for an image that is exchangeable with the others, however the scores
    depend on each other.

    Args:
        scores: (M, K). NaN counts as higher than any number.
        calibration: (N, K).
        two_sided: for each score, whether low values are anomalous, too.
        ties: random numbers (M,), uniform in [0, 1), that order equal combined scores. Without them all of the
            calibration images count as more anomalous.

    Returns:
        p-values (M,) in 1 / (N + 1) ... 1.
    """
    count, number = calibration.shape
    values = np.where(np.isnan(scores), np.inf, scores)
    ranked, log = np.sort(calibration, axis=0), np.log(np.arange(1, count + 2))
    p_values = np.empty(len(scores))
    size = max(1, PIECE // max(1, count))
    for start in range(0, len(scores), size):
        part = slice(start, start + size)
        of_images, of_calibration = np.zeros(len(values[part])), np.zeros((len(values[part]), count))
        for k in range(number):
            column, test = calibration[:, k], values[part, k][:, None]
            high = count - np.searchsorted(ranked[:, k], column, side="left") + (test >= column)
            high_test = count + 1 - np.searchsorted(ranked[:, k], test[:, 0], side="left")
            if two_sided[k]:
                low = np.searchsorted(ranked[:, k], column, side="right") + (test <= column)
                high = np.minimum(high, low)
                high_test = np.minimum(high_test, 1 + np.searchsorted(ranked[:, k], test[:, 0], side="right"))
            of_calibration -= log[high - 1]
            of_images -= log[high_test - 1]
        above = (of_calibration > of_images[:, None]).sum(axis=1)
        equal = (of_calibration == of_images[:, None]).sum(axis=1)
        p_values[part] = (1 + above + (equal if ties is None else np.floor(ties[part] * (equal + 1)))) / (count + 1)
    return p_values


def least_calibration_images(alpha: float, least_p_value: Callable[[int], float]) -> int:
    """The least number N of calibration images for which a p-value can reach ``alpha`` > 0.

    Args:
        alpha: significance level.
        least_p_value: the least possible p-value as a decreasing function of N.

    Raises:
        ValueError: naming ``alpha``, if no number of images is enough.

    Example:
        >>> least_calibration_images(0.05, lambda count: 1 / (count + 1))
        19
    """

    def enough(count: int) -> bool:
        return least_p_value(count) <= alpha

    high = 1
    while not enough(high):
        high *= 2
        if high > MOST_IMAGES:
            raise ValueError(f"alpha must be larger, no number of calibration images is enough for {alpha:g}")
    return bisect_left(range(high), True, lo=high // 2 + 1, key=enough)
