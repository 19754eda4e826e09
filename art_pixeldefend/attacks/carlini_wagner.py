"""Carlini and Wagner's L-infinity attack as the paper's code runs it, a batch at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from art.attacks.attack import EvasionAttack
from art.config import ART_NUMPY_DTYPE
from art.estimators.classification.classifier import ClassGradientsMixin
from art.estimators.estimator import BaseEstimator
from art.utils import check_and_transform_label_format, get_labels_np_array

from art_pixeldefend.attacks.budget import round_outwards, scalar_clip_values
from art_pixeldefend.attacks.margin import Margin
from art_pixeldefend.validation import check_count, check_number

SMOOTHER = 1.999999  # keeps arctanh finite at both ends of the range; the authors' number
GIVE_UP = 1 / 256  # radii below a level are not looked for


class CarliniWagnerLInf(EvasionAttack):
    """The smallest L-infinity change that the method finds (Carlini and Wagner 2017, arXiv:1608.04644, section VI.C).

        minimise  const max(0, z_true - max other z) + sum max(0, |x' - x| - tau)

    over x' = tanh(w) / 2 by Adam; whenever that reaches 0, tau becomes 0.9 of the distance reached, until it fails.
    Every search starts from the image the last one found, as in the authors' code. In the end changes are rounded
    outwards to whole levels: the search ends on the boundary, and rounding to the nearest level takes many images back.

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

    def generate(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
        """Attacked images of ``x`` (N, ...), of any distance; an image that withstands comes back as it was.

        Args:
            x: images within the clip values.
            y: labels to get away from, class numbers (N,) or one-hot; by default the model's own predictions.
        """
        x = x.astype(ART_NUMPY_DTYPE)
        if not len(x):
            return x
        if y is None:
            y = get_labels_np_array(self.estimator.predict(x, batch_size=self.batch_size))
        y = check_and_transform_label_format(y, nb_classes=self.estimator.nb_classes)
        low, high = scalar_clip_values(self.estimator)
        self._margin = Margin(self.estimator)  # now: its defences may have been changed since the last time
        attacked = x.copy()
        for i in range(0, len(x), self.batch_size):
            piece = slice(i, i + self.batch_size)
            centred = ((x[piece] - low) / (high - low) - 0.5).astype(np.float64)
            attacked[piece] = low + (self._shrink(centred, y[piece]) + 0.5) * (high - low)
        return round_outwards(attacked, x, (low, high))

    def _shrink(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Closer and closer attacked images, until none is found closer; everything in [-0.5, 0.5].

        Every image is at a step of a search of its own; one that has succeeded or failed begins the next at once.
        """
        best, search = x.copy(), _Searches(x, self.initial_const)
        active = np.arange(len(x))
        while len(active):
            images = search.images(active)
            loss, gradient = self._objective(images, x[active], y[active], search.tau[active], search.const[active])
            search.step(active, gradient, self.learning_rate)
            # The authors look at the loss before the step, and at the prediction after it.
            ready = active[loss < 1e-4 * search.const[active]]
            if ready.size:
                images = search.images(ready)
                fooled = self._predict(images) != y[ready].argmax(axis=1)
                won = ready[fooled]
                best[won] = images[fooled]
                reached = np.abs(best[won] - x[won]).max(axis=self._features(x))
                search.tau[won] = self.decrease_factor * np.minimum(search.tau[won], reached)
                search.begin(won, best[won])
            lost = active[search.steps[active] >= self.max_iter]
            search.const[lost] *= self.const_factor
            search.begin(lost, best[lost])
            active = active[(search.tau[active] > GIVE_UP) & (search.const[active] < self.largest_const)]
        return best

    def _objective(
        self, images: np.ndarray, x: np.ndarray, y: np.ndarray, tau: np.ndarray, const: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The loss (N,) and its gradient in images of [-0.5, 0.5]."""
        low, high = scalar_clip_values(self.estimator)
        margins, gradients = self._margin((low + (images + 0.5) * (high - low)).astype(np.float32), y)
        shape = (-1, *[1] * (images.ndim - 1))
        weights = np.where(margins > 0, const, 0.0) * (high - low)
        excess = np.abs(images - x) - tau.reshape(shape)
        loss = const * np.maximum(margins, 0) + np.maximum(excess, 0).sum(axis=self._features(images))
        return loss, weights.reshape(shape) * gradients + (excess > 0) * np.sign(images - x)

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
        for name in ("learning_rate", "initial_const", "largest_const", "const_factor", "decrease_factor"):
            setattr(self, name, check_number(name, getattr(self, name)))
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not self.const_factor > 1:
            raise ValueError(f"const_factor must be greater than 1, got {self.const_factor!r}")
        if not self.decrease_factor < 1:
            raise ValueError(f"decrease_factor must be between 0 and 1, got {self.decrease_factor!r}")
        scalar_clip_values(self.estimator)


class _Searches:
    """Where each image's search is: Adam's state over w, steps taken, tau, the weight of the logits."""

    def __init__(self, x: np.ndarray, const: float) -> None:
        self.w, self.mean, self.square = (np.zeros_like(x) for _ in range(3))
        self.steps, self.tau, self.const = np.zeros(len(x), int), np.ones(len(x)), np.full(len(x), const)
        self.begin(np.arange(len(x)), x)

    def begin(self, which: np.ndarray, start: np.ndarray) -> None:
        """A new search from the images ``start``."""
        self.w[which] = np.arctanh(start * SMOOTHER)
        self.mean[which], self.square[which], self.steps[which] = 0.0, 0.0, 0

    def images(self, which: np.ndarray) -> np.ndarray:
        """In [-0.5, 0.5]."""
        return np.tanh(self.w[which]) / 2

    def step(self, which: np.ndarray, gradient: np.ndarray, learning_rate: float) -> None:
        """One of Adam's, given the gradient in the images."""
        gradient = gradient * (1 - np.tanh(self.w[which]) ** 2) / 2
        self.steps[which] += 1
        self.mean[which] = 0.9 * self.mean[which] + 0.1 * gradient
        self.square[which] = 0.999 * self.square[which] + 0.001 * gradient**2
        t = self.steps[which].reshape(-1, *[1] * (gradient.ndim - 1))
        rate = learning_rate * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        self.w[which] -= rate * self.mean[which] / (np.sqrt(self.square[which]) + 1e-8)
