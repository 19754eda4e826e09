"""DeepFool in the L-infinity norm; ART has the L2 version only."""

from __future__ import annotations

from typing import Any

import numpy as np
from art.attacks.attack import EvasionAttack
from art.config import ART_NUMPY_DTYPE
from art.estimators.classification.classifier import ClassGradientsMixin
from art.estimators.estimator import BaseEstimator

from art_pixeldefend.attacks.budget import level, round_outwards, scalar_clip_values
from art_pixeldefend.validation import check_attributes, check_count, check_number


class DeepFoolLInf(EvasionAttack):
    """DeepFool for the L-infinity norm (Moosavi-Dezfooli et al. 2016, arXiv:1511.04599, section 3.3, p = infinity).

        x <- x + (1 + overshoot) |f_k| / ||w_k||_1 sign(w_k),  k the class nearest in that norm,
        f_k and w_k: logit k, and its gradient, less those of the class predicted first

    until the prediction changes. An 8-bit image cannot hold a fraction of a level, and an image that is rounded after
    the search is often back on its old side of the boundary. Every step is therefore rounded outwards to whole levels,
    at least one, and the prediction is that for the rounded image. ART's ``DeepFool`` takes L2 steps, which change few
    pixels by more than a small L-infinity ball allows.

    Args:
        estimator: an ART classifier with class gradients and clip values; its outputs should be logits.
        max_iter: most steps (PixelDefend's code: 50).
        overshoot: PixelDefend's code: 0.02.
        batch_size: images at a time.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from torch import nn
        >>> from art.estimators.classification import PyTorchClassifier
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
        >>> classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 4, 4), 10, clip_values=(0, 1))
        >>> x = np.full((2, 1, 4, 4), 0.5, np.float32)
        >>> attacked = DeepFoolLInf(classifier).generate(x)
        >>> (classifier.predict(attacked).argmax(1) != classifier.predict(x).argmax(1)).all()
        np.True_
    """

    attack_params = [*EvasionAttack.attack_params, "max_iter", "overshoot", "batch_size"]
    _estimator_requirements = (BaseEstimator, ClassGradientsMixin)

    def __init__(self, estimator: Any, *, max_iter: int = 50, overshoot: float = 0.02, batch_size: int = 128) -> None:
        super().__init__(estimator=estimator)
        self.max_iter, self.overshoot, self.batch_size = max_iter, overshoot, batch_size
        self._check_params()

    def generate(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
        """Attack images ``x`` (N, ...); distances are not bounded. ``y`` is ignored, as in ART's DeepFool."""
        x = x.astype(ART_NUMPY_DTYPE)
        pieces = [self._attack(x[i : i + self.batch_size]) for i in range(0, len(x), self.batch_size)]
        return np.concatenate(pieces) if pieces else x.copy()

    def _attack(self, x: np.ndarray) -> np.ndarray:
        clip_values = scalar_clip_values(self.estimator)
        attacked = x.copy()
        logits = self.estimator.predict(x, batch_size=self.batch_size)
        first = logits.argmax(axis=1)
        active = np.arange(len(x))
        for _ in range(self.max_iter):
            before = attacked[active]
            step = self._step(before, logits, first[active])
            attacked[active] = round_outwards(before + (1 + self.overshoot) * step, before, clip_values)
            logits = self.estimator.predict(attacked[active], batch_size=self.batch_size)
            unmoved = logits.argmax(axis=1) == first[active]
            active, logits = active[unmoved], logits[unmoved]
            if not len(active):
                break
        return attacked

    def _step(self, x: np.ndarray, logits: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Return the smallest change of ``x`` that reaches the linearised classifier's boundary, at least a level."""
        rows = np.arange(len(x))
        gradients = self.estimator.class_gradient(x)
        w = (gradients - gradients[rows, first][:, None]).reshape(len(x), logits.shape[1], -1)
        norms = np.abs(w).sum(axis=2)
        norms[rows, first] = np.inf  # avoids 0 / 0 for the class itself, which is excluded below
        distances = np.abs(logits - logits[rows, first][:, None]) / np.maximum(norms, 1e-12)
        distances[rows, first] = np.inf
        nearest = distances.argmin(axis=1)
        # A little more than the distance: an image on the boundary itself has not crossed it. The least is what makes
        # one level with the overshoot: rounding would lose less.
        length = np.maximum(distances[rows, nearest] + 1e-6, level(self.estimator) / (1 + self.overshoot))
        change = length[:, None] * np.sign(w[rows, nearest])
        return change.reshape(x.shape).astype(x.dtype)

    def _check_params(self) -> None:
        check_attributes(self, check_count, "max_iter", "batch_size")
        self.overshoot = check_number("overshoot", self.overshoot)
        scalar_clip_values(self.estimator)
