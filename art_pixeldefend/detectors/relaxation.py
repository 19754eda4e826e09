"""Differentiable approximations of conformal p-values, through which gradients reach an image.

A conformal p-value is a rank, whose gradient is zero almost everywhere. Here its logarithm is interpolated linearly
between scores of calibration images, and extrapolated beyond the highest of them, so that an attack that is flagged
finds a direction in which it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from art_pixeldefend.detectors.conformal import harmonic_constant

NODES = 48  # ranks between which p-values are interpolated, about; spaced evenly in log p
CLOSE = 1e-9  # scores closer than this, relative to the largest one, count as equal
BEYOND = 0.03  # weight of what is extrapolated, in a sum over scores
TAIL = 0.1  # the share of calibration images from which the slope beyond the highest score is taken


class LogPValues:
    """The logarithm of conformal p-values as a continuous function of one score.

    At the calibration score of rank r, counted from the highest, it is log(r / (N + 1)): the p-value of a score just
    above. Between neighbouring scores the approximation is therefore at most the p-value.

    Args:
        calibration: the calibration scores (N,).
        two_sided: low scores are anomalous, too.
        adjust: changes the p-values (M,) of one side, as calibration-conditional ones are.

    Example:
        >>> log_p = LogPValues(np.arange(99.0))
        >>> log_p(torch.tensor([50.0, 98.0])).exp()
        tensor([0.4896, 0.0100], dtype=torch.float64)
    """

    def __init__(
        self,
        calibration: np.ndarray,
        two_sided: bool = False,
        adjust: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        sides = [calibration, -calibration] if two_sided else [calibration]
        self._nodes = [_nodes(side, adjust) for side in sides]

    def __call__(self, scores: Tensor) -> Tensor:
        """log p (M,), at most 0, float64, of scores (M,)."""
        logs = [
            _interpolate(sign * scores.double(), nodes) for sign, nodes in zip((1.0, -1.0), self._nodes, strict=False)
        ]
        least = logs[0] if len(logs) == 1 else math.log(2) + torch.minimum(*logs)
        return least.clamp(max=0.0)


def combine_logs(logs: Tensor, method: str) -> Tensor:
    """The logarithm of :func:`.conformal.combine_p_values`, differentiable.

    Args:
        logs: log p-values (M, K).
        method: ``"bonferroni"``, ``"harmonic"`` or ``"cauchy"``.

    Returns:
        (M,), at most 0.

    Example:
        >>> p_values = torch.tensor([[0.01, 0.5, 0.9]], dtype=torch.float64)
        >>> combine_logs(p_values.log(), "bonferroni").exp()
        tensor([0.0300], dtype=torch.float64)
    """
    count = logs.shape[1]
    if method == "bonferroni":
        combined = math.log(count) + logs.amin(dim=1)
    elif method == "harmonic":
        combined = math.log(harmonic_constant(count) * count) - torch.logsumexp(-logs, dim=1)
    else:
        # The mean of 1 / tan(pi p) is m; p = acot(m) / pi, and 1 / (pi m) where that is small.
        mean = (1 / torch.tan(math.pi * logs.clamp(min=-500.0, max=-1e-12).exp())).mean(dim=1)
        combined = (torch.atan2(torch.ones_like(mean), mean) / math.pi).log()
    return combined.clamp(max=0.0)


class JointLogPValues:
    """The logarithm of :func:`.conformal.joint_p_values` as a continuous function of several scores.

    Args:
        calibration: the calibration scores (N, K).
        two_sided: for each score, whether low values are anomalous, too.
    """

    def __init__(self, calibration: np.ndarray, two_sided: Sequence[bool]) -> None:
        self._least = -math.log(len(calibration) + 1)
        self._each = [LogPValues(calibration[:, k], sides) for k, sides in enumerate(two_sided)]
        self._combined = LogPValues(self._statistic(torch.from_numpy(calibration)).numpy())

    def __call__(self, scores: Tensor) -> Tensor:
        """log p (M,) of scores (M, K)."""
        return self._combined(self._statistic(scores))

    def _statistic(self, scores: Tensor) -> Tensor:
        """Minus the sum of the logarithms of the ranks, up to a constant.

        No rank is below 1. What is extrapolated beyond hardly counts, but keeps a gradient.
        """
        logs = torch.stack([log_p(scores[:, k]) for k, log_p in enumerate(self._each)], dim=1)
        beyond = (logs - self._least).clamp(max=0.0)
        return -(logs - (1 - BEYOND) * beyond).sum(dim=1)


def _nodes(calibration: np.ndarray, adjust: Callable[[np.ndarray], np.ndarray] | None) -> tuple[Tensor, Tensor]:
    """Scores, ascending, and log p at each; the first and last pair set the slopes beyond all calibration scores."""
    count, ordered = len(calibration), np.sort(calibration)[::-1]
    ranks = np.unique(np.append(np.rint(np.geomspace(1, count, NODES)).astype(int), count))
    p_values = ranks / (count + 1)
    logs = np.log(p_values if adjust is None else adjust(p_values))
    least = CLOSE * max(1.0, np.abs(ordered).max())
    scores, values = [ordered[0]], [logs[0]]
    for score, log in zip(ordered[ranks - 1][1:], logs[1:], strict=True):
        if scores[-1] - score > least:  # of equal scores the one of the lowest rank is kept
            scores.append(score)
            values.append(log)
    tail = min(max(math.ceil(TAIL * count), 2), count)
    width = max(ordered[0] - ordered[tail - 1], least)
    positions = [scores[0] + width, *scores, scores[-1] - width]
    return torch.tensor(positions[::-1]), torch.tensor([values[0] - math.log(tail), *values, 0.0][::-1])


def _interpolate(x: Tensor, nodes: tuple[Tensor, Tensor]) -> Tensor:
    """The piecewise linear function through the nodes, continued beyond the last two; of NaN it is the last value."""
    positions, values = (part.to(x.device) for part in nodes)
    x = torch.where(x.isnan(), positions[-1], x)
    right = torch.searchsorted(positions, x.detach().contiguous()).clamp(1, len(positions) - 1)
    left = right - 1
    slope = (values[right] - values[left]) / (positions[right] - positions[left])
    return values[left] + slope * (x - positions[left])
