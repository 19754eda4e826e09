"""Any attack, kept within a ball and on the 8-bit grid."""

from __future__ import annotations

from typing import Any

import numpy as np
from art.attacks.attack import EvasionAttack
from art.estimators.estimator import BaseEstimator

from art_pixeldefend.attacks.budget import clip_to_ball, scalar_clip_values
from art_pixeldefend.validation import check_eps


class Clipped(EvasionAttack):
    """Another attack's images, rounded to 8 bits and clipped to the L-infinity ball around the input.

    The paper does so with DeepFool and CW, which know no ball of their own; and every attacked image is an 8-bit one
    before anything sees it (PixelDefend, Appendix B and reference code).

    Args:
        attack: any ART evasion attack on an estimator with clip values.
        eps: radius in levels, 0..255.

    Raises:
        ValueError: naming the argument that is not as described.
    """

    attack_params = [*EvasionAttack.attack_params, "attack", "eps"]
    _estimator_requirements = (BaseEstimator,)

    def __init__(self, attack: EvasionAttack, *, eps: int) -> None:
        super().__init__(estimator=attack.estimator)
        self.attack, self.eps = attack, eps
        self._check_params()

    def generate(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
        """The attack's images of ``x`` (N, ...) after rounding and clipping; other arguments are the attack's."""
        attacked = self.attack.generate(x, y, **kwargs)
        return clip_to_ball(attacked, x, self.eps, scalar_clip_values(self.estimator))

    def _check_params(self) -> None:
        self.eps = check_eps("eps", self.eps)
        scalar_clip_values(self.estimator)
