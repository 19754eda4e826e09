"""A wrapper that keeps any attack within a ball and on the 8-bit grid."""

from __future__ import annotations

from typing import Any

import numpy as np
from art.attacks.attack import EvasionAttack
from art.estimators.estimator import BaseEstimator

from art_pixeldefend.attacks.budget import clip_to_ball, scalar_clip_values
from art_pixeldefend.validation import check_eps


class Clipped(EvasionAttack):
    """Round another attack's images to 8 bits and clip them to the L-infinity ball around the input.

    PixelDefend's evaluation does so with DeepFool and CW, which have no radius of their own, and rounds the images of
    every attack to 8 bits before they are classified (Appendix B and reference code).

    Args:
        attack: any ART evasion attack on an estimator with clip values.
        eps: radius in levels, 0..255.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from torch import nn
        >>> from art.attacks.evasion import ProjectedGradientDescent
        >>> from art.estimators.classification import PyTorchClassifier
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
        >>> classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 4, 4), 10, clip_values=(0, 255))
        >>> attack = ProjectedGradientDescent(classifier, eps=9.5, eps_step=2.5, verbose=False)
        >>> attacked = Clipped(attack, eps=8).generate(np.full((1, 1, 4, 4), 100, np.float32))
        >>> np.abs(attacked - 100).max() <= 8
        np.True_
    """

    attack_params = [*EvasionAttack.attack_params, "attack", "eps"]
    _estimator_requirements = (BaseEstimator,)

    def __init__(self, attack: EvasionAttack, *, eps: int) -> None:
        super().__init__(estimator=attack.estimator)
        self.attack, self.eps = attack, eps
        self._check_params()

    def generate(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
        """Attack images ``x`` (N, ...), then round and clip; all arguments are passed on to the attack."""
        attacked = self.attack.generate(x, y, **kwargs)
        return clip_to_ball(attacked, x, self.eps, scalar_clip_values(self.estimator))

    def _check_params(self) -> None:
        self.eps = check_eps("eps", self.eps)
        scalar_clip_values(self.estimator)
