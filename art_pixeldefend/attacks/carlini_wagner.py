"""Carlini and Wagner's L-infinity attack as the paper's code runs it, a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from art.attacks.attack import EvasionAttack
from art.estimators.classification.classifier import ClassGradientsMixin
from art.estimators.estimator import BaseEstimator
from art.utils import check_and_transform_label_format, get_labels_np_array

from art_pixeldefend.attacks.budget import scalar_clip_values
from art_pixeldefend.attacks.margin import Margin
from art_pixeldefend.validation import check_count

SMOOTHER = 1.999999  # keeps arctanh finite at both ends of the range; the authors' number
GIVE_UP = 1 / 256  # radii below a level are not looked for


class CarliniWagnerLInf(EvasionAttack):
    """The smallest L-infinity change that the method finds (Carlini and Wagner 2017, arXiv:1608.04644, section VI.C).

        minimise  const max(0, z_true - max other z) + sum max(0, |x' - x| - tau)

    over x' = tanh(w) / 2 by Adam; whenever that reaches 0, tau becomes 0.9 of the distance reached, until it fails.
    Every search starts from the image the last one found, as in the authors' code.

    ART's ``CarliniLInfMethod`` goes one image at a time, starts every search from the input, and stops one as soon as
    the whole objective is below 0.001: with the reference code's constants, which weigh the logits by 1e-5, that is so
    after one step, which moves no pixel by a level.

    Args:
        estimator: an ART classifier with class gradients and clip values, whose outputs are logits.
        max_iter: steps of a search (the paper's code: 100).
        learning_rate: Adam's (5e-3), for images scaled to [-0.5, 0.5].
        initial_const, largest_const, const_factor: the weight of the logits begins at the first (1e-5) and is
            multiplied by the last (100) after a failure, as long as it is less than the second (1e-3).
        decrease_factor: by which tau shrinks (0.9).
        batch_size: images at a time.

    Raises:
        ValueError: naming the argument that is not as described.
    """

    attack_params = [
        *EvasionAttack.attack_params,
        "max_iter", "learning_rate", "initial_const", "largest_const", "const_factor", "decrease_factor", "batch_size",
    ]  # fmt: skip
    _estimator_requirements = (BaseEstimator, ClassGradientsMixin)

    def __init__(
        self,
        estimator: Any,
        *,
        max_iter: int = 100,
        learning_rate: float = 5e-3,
        initial_const: float = 1e-5,
        largest_const: float = 1e-3,
        const_factor: float = 100.0,
        decrease_factor: float = 0.9,
        batch_size: int = 128,
    ) -> None:
        super().__init__(estimator=estimator)
        self.max_iter, self.learning_rate, self.batch_size = max_iter, learning_rate, batch_size
        self.initial_const, self.largest_const, self.const_factor = initial_const, largest_const, const_factor
        self.decrease_factor = decrease_factor
        self._check_params()
        self._margin = Margin(estimator)

    def generate(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
        """Attacked images of ``x`` (N, ...), of any distance; an image that withstands comes back as it was.

        Args:
            x: images within the clip values.
            y: labels to get away from, class numbers (N,) or one-hot; by default the model's own predictions.
        """
        if not len(x):
            return x.copy()
        if y is None:
            y = get_labels_np_array(self.estimator.predict(x, batch_size=self.batch_size))
        y = check_and_transform_label_format(y, nb_classes=self.estimator.nb_classes)
        low, high = scalar_clip_values(self.estimator)
        attacked = x.copy()
        for i in range(0, len(x), self.batch_size):
            piece = slice(i, i + self.batch_size)
            centred = ((x[piece] - low) / (high - low) - 0.5).astype(np.float64)
            attacked[piece] = low + (self._shrink(centred, y[piece]) + 0.5) * (high - low)
        return attacked

    def _shrink(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Closer and closer attacked images, until none is found closer; everything in [-0.5, 0.5]."""
        best, tau, const = x.copy(), np.ones(len(x)), np.full(len(x), self.initial_const)
        active = np.arange(len(x))
        while len(active):
            problem = _Problem(x[active], y[active], best[active], tau[active], const[active])
            found, attacked, used = self._escalate(problem)
            active = active[found]
            best[active], const[active] = attacked[found], used[found]
            reached = np.abs(best[active] - x[active]).max(axis=self._features(x))
            tau[active] = self.decrease_factor * np.minimum(tau[active], reached)
            active = active[tau[active] > GIVE_UP]
        return best

    def _escalate(self, problem: _Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whether each image was attacked, the images, and the weights that did it: greater where smaller failed."""
        count = len(problem.x)
        found, attacked, const = np.zeros(count, bool), problem.start.copy(), problem.const.copy()
        while (trying := np.flatnonzero(~found & (const < self.largest_const))).size:
            won, images = self._search(problem.only(trying, const[trying]))
            found[trying[won]] = True
            attacked[trying[won]] = images[won]
            const[trying[~won]] *= self.const_factor
        return found, attacked, const

    def _search(self, problem: _Problem) -> tuple[np.ndarray, np.ndarray]:
        """Adam from ``start``: whether each image was attacked within tau, and the images."""
        w = np.arctanh(problem.start * SMOOTHER)
        mean, square = np.zeros_like(w), np.zeros_like(w)
        found, attacked = np.zeros(len(w), bool), problem.start.copy()
        for step in range(1, self.max_iter + 1):
            going = np.flatnonzero(~found)
            if not going.size:
                break
            part = problem.only(going, problem.const[going])
            loss, gradient = self._objective(part, np.tanh(w[going]) / 2)
            gradient *= (1 - np.tanh(w[going]) ** 2) / 2
            mean[going] = 0.9 * mean[going] + 0.1 * gradient
            square[going] = 0.999 * square[going] + 0.001 * gradient**2
            rate = self.learning_rate * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
            w[going] -= rate * mean[going] / (np.sqrt(square[going]) + 1e-8)
            # The authors look at the loss before the step, and at the prediction after it.
            ready = going[loss < 1e-4 * part.const]
            if ready.size:
                images = np.tanh(w[ready]) / 2
                fooled = self._predict(images) != problem.y[ready].argmax(axis=1)
                found[ready[fooled]], attacked[ready[fooled]] = True, images[fooled]
        return found, attacked

    def _objective(self, problem: _Problem, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The loss (N,) and its gradient in images of [-0.5, 0.5]."""
        low, high = scalar_clip_values(self.estimator)
        margins, gradients = self._margin((low + (images + 0.5) * (high - low)).astype(np.float32), problem.y)
        shape = (-1, *[1] * (images.ndim - 1))
        weights = np.where(margins > 0, problem.const, 0.0) * (high - low)
        excess = np.abs(images - problem.x) - problem.tau.reshape(shape)
        loss = problem.const * np.maximum(margins, 0) + np.maximum(excess, 0).sum(axis=self._features(images))
        return loss, weights.reshape(shape) * gradients + (excess > 0) * np.sign(images - problem.x)

    @staticmethod
    def _features(x: np.ndarray) -> tuple[int, ...]:
        """Every axis but the batch's."""
        return tuple(range(1, x.ndim))

    def _predict(self, images: np.ndarray) -> np.ndarray:
        low, high = scalar_clip_values(self.estimator)
        x = (low + (images + 0.5) * (high - low)).astype(np.float32)
        return self.estimator.predict(x, batch_size=self.batch_size).argmax(axis=1)

    def _check_params(self) -> None:
        self.max_iter = check_count("max_iter", self.max_iter)
        self.batch_size = check_count("batch_size", self.batch_size)
        for name in ("learning_rate", "initial_const", "largest_const"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not self.const_factor > 1:
            raise ValueError(f"const_factor must be greater than 1, got {self.const_factor!r}")
        if not 0 < self.decrease_factor < 1:
            raise ValueError(f"decrease_factor must be between 0 and 1, got {self.decrease_factor!r}")
        scalar_clip_values(self.estimator)


@dataclass(frozen=True)
class _Problem:
    """What one search is about, an entry per image: original, labels, where to start, tau, the weight of the logits."""

    x: np.ndarray
    y: np.ndarray
    start: np.ndarray
    tau: np.ndarray
    const: np.ndarray

    def only(self, which: np.ndarray, const: np.ndarray) -> _Problem:
        """The problem of some of the images, with these weights."""
        return _Problem(self.x[which], self.y[which], self.start[which], self.tau[which], const)
