"""RAND: uniform random noise."""

from __future__ import annotations

from typing import Any

import numpy as np
from art.attacks.attack import EvasionAttack
from art.estimators.estimator import BaseEstimator

from art_pixeldefend.attacks.budget import scalar_clip_values
from art_pixeldefend.levels import from_levels, to_levels
from art_pixeldefend.validation import check_count, check_eps


class RandomNoise(EvasionAttack):
    """Add a whole number of levels, uniform in [-eps, eps], to every value (RAND of PixelDefend, section 3.2).

    Args:
        estimator: an ART estimator with clip values.
        eps: radius in levels, 0..255.
        seed: of the noise. Every call to ``generate`` starts from it, so that the same images get the same noise.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from torch import nn
        >>> from art.estimators.classification import PyTorchClassifier
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
        >>> classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 4, 4), 10, clip_values=(0, 255))
        >>> attacked = RandomNoise(classifier, eps=8).generate(np.full((1, 1, 4, 4), 100, np.uint8))
        >>> 92 <= attacked.min() and attacked.max() <= 108
        np.True_
    """

    attack_params = [*EvasionAttack.attack_params, "eps", "seed"]
    _estimator_requirements = (BaseEstimator,)

    def __init__(self, estimator: Any, *, eps: int, seed: int = 0) -> None:
        super().__init__(estimator=estimator)
        self.eps, self.seed = eps, seed
        self._check_params()

    def generate(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
        """Round images ``x`` (N, ...) to levels and add noise; ``y`` is ignored."""
        clip_values = scalar_clip_values(self.estimator)
        noise = np.random.default_rng(self.seed).integers(-self.eps, self.eps, x.shape, endpoint=True)
        return from_levels(np.clip(to_levels(x, clip_values) + noise, 0, 255), clip_values, x.dtype)

    def _check_params(self) -> None:
        self.eps, self.seed = check_eps("eps", self.eps), check_count("seed", self.seed, least=0)
        scalar_clip_values(self.estimator)
