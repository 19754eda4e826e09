"""The L-infinity attack of Carlini and Wagner, a batch at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.config import ART_NUMPY_DTYPE
from art.estimators.classification import PyTorchClassifier
from art.utils import check_and_transform_label_format, get_labels_np_array
from torch import Tensor

from art_pixeldefend.attacks.budget import round_outwards, scalar_clip_values
from art_pixeldefend.purifiers.logits import differentiable_logits
from art_pixeldefend.validation import check_attributes, check_count, check_number

SMOOTHER = 1.999999  # keeps atanh finite at both ends of the range, as in the authors' code
SMALLEST_TAU = 1 / 256  # a search within less than one level is not begun


class CarliniWagnerLInf(EvasionAttack):
    """Search for the smallest L-infinity change that fools a classifier (Carlini and Wagner 2017, arXiv:1608.04644).

    Their section VI.C:

        minimise  const max(0, z_true - max other z) + sum max(0, |x' - x| - tau)

    over x' = tanh(w) / 2 by Adam. Whenever that reaches 0, tau becomes 0.9 of the distance reached; the search ends
    when it fails. Every search starts from the image that the last one found, as in the authors' code. In the end
    changes are rounded outwards to whole levels: the search ends on the decision boundary, and rounding to the nearest
    level would take many images back across it.

    ART's ``CarliniLInfMethod`` goes one image at a time, starts every search from the input, and stops as soon as the
    whole objective is below 0.001. With the constants of PixelDefend's code, which weigh the logits by 1e-5, that
    happens after one step, which moves no pixel by a level.

    Args:
        estimator: a PyTorch classifier with clip values, whose outputs are logits.
        max_iter: steps of one search (PixelDefend's code: 100).
        learning_rate: of Adam, for images scaled to [-0.5, 0.5] (5e-3).
        initial_const, largest_const, const_factor: the weight of the logits starts at ``initial_const`` (1e-5) and is
            multiplied by ``const_factor`` (100) after a failure while it is less than ``largest_const`` (1e-3).
        decrease_factor: factor by which tau shrinks (0.9).
        batch_size: images at a time.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
        >>> classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 4, 4), 10, clip_values=(0, 1))
        >>> x = np.full((2, 1, 4, 4), 0.5, np.float32)
        >>> attacked = CarliniWagnerLInf(classifier).generate(x)
        >>> (classifier.predict(attacked).argmax(1) != classifier.predict(x).argmax(1)).all()
        np.True_
    """

    attack_params = [
        *EvasionAttack.attack_params,
        "max_iter", "learning_rate", "initial_const", "largest_const", "const_factor", "decrease_factor", "batch_size",
    ]  # fmt: skip
    _estimator_requirements = (PyTorchClassifier,)

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
        """Attack images; the distances are not bounded, and an image that is not fooled is returned unchanged.

        Args:
            x: images (N, ...) within the clip values.
            y: labels to get away from, class numbers (N,) or one-hot; by default the model's own predictions.
        """
        x = x.astype(ART_NUMPY_DTYPE)
        if not len(x):
            return x
        if y is None:
            y = get_labels_np_array(self.estimator.predict(x, batch_size=self.batch_size))
        y = check_and_transform_label_format(y, nb_classes=self.estimator.nb_classes)
        labels = torch.from_numpy(y.argmax(axis=1)).to(self.estimator.device)
        low, high = scalar_clip_values(self.estimator)
        attacked = x.copy()
        for i in range(0, len(x), self.batch_size):
            piece = slice(i, i + self.batch_size)
            centred = torch.from_numpy(((x[piece] - low) / (high - low) - 0.5).astype(np.float64))
            found = self._shrink(centred.to(self.estimator.device), labels[piece])
            attacked[piece] = low + (found.cpu().numpy() + 0.5) * (high - low)
        return round_outwards(attacked, x, (low, high))

    def _shrink(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the closest fooled images found, in [-0.5, 0.5]; each image runs its own sequence of searches."""
        best, search = x.clone(), _Searches(x, self.initial_const)
        active = torch.arange(len(x), device=x.device)
        while len(active):
            loss, gradient = self._objective(
                search.images(active), x[active], labels[active], search.tau[active], search.const[active]
            )
            search.step(active, gradient, self.learning_rate)
            # As in the authors' code, the loss is that before the step and the prediction that after it.
            ready = active[loss < 1e-4 * search.const[active]]
            if len(ready):
                images = search.images(ready)
                with torch.no_grad():
                    fooled = self._logits(images).argmax(dim=1) != labels[ready]
                won = ready[fooled]
                best[won] = images[fooled]
                reached = (best[won] - x[won]).abs().flatten(1).amax(dim=1)
                search.tau[won] = self.decrease_factor * search.tau[won].minimum(reached)
                search.begin(won, best[won])
            lost = active[search.steps[active] >= self.max_iter]
            search.const[lost] *= self.const_factor
            search.begin(lost, best[lost])
            active = active[(search.tau[active] > SMALLEST_TAU) & (search.const[active] < self.largest_const)]
        return best

    def _objective(
        self, images: Tensor, x: Tensor, labels: Tensor, tau: Tensor, const: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss (N,) and its gradient in ``images``, which like ``x`` are in [-0.5, 0.5]."""
        images.requires_grad_()
        logits = self._logits(images)
        true = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
        margin = logits[true] - logits.masked_fill(true, -torch.inf).amax(dim=1)
        (gradient,) = torch.autograd.grad(margin.sum(), images)
        images, margin = images.detach(), margin.detach().double()
        excess = (images - x).abs() - _over_pixels(tau, x)
        loss = const * margin.clamp(min=0) + excess.clamp(min=0).flatten(1).sum(dim=1)
        return loss, _over_pixels(const * (margin > 0), x) * gradient + (excess > 0) * (images - x).sign()

    def _logits(self, images: Tensor) -> Tensor:
        """Return the logits for images in [-0.5, 0.5]."""
        low, high = scalar_clip_values(self.estimator)
        return differentiable_logits(self.estimator, (low + (images + 0.5) * (high - low)).float())

    def _check_params(self) -> None:
        check_attributes(self, check_count, "max_iter", "batch_size")
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
    """The state of each image's search: w, Adam's moments, steps taken, tau, the weight of the logits."""

    def __init__(self, x: Tensor, const: float) -> None:
        self.w, self.mean, self.square = (torch.zeros_like(x) for _ in range(3))
        self.steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.tau, self.const = x.new_ones(len(x)), x.new_full((len(x),), const)
        self.begin(torch.arange(len(x), device=x.device), x)

    def begin(self, which: Tensor, start: Tensor) -> None:
        """Start a new search from the images ``start``."""
        self.w[which] = torch.atanh(start * SMOOTHER)
        self.mean[which], self.square[which], self.steps[which] = 0.0, 0.0, 0

    def images(self, which: Tensor) -> Tensor:
        """Return images in [-0.5, 0.5]."""
        return torch.tanh(self.w[which]) / 2

    def step(self, which: Tensor, gradient: Tensor, learning_rate: float) -> None:
        """Take one step of Adam with TensorFlow's epsilon, given the gradient in the images."""
        gradient = gradient * (1 - torch.tanh(self.w[which]) ** 2) / 2
        self.steps[which] += 1
        self.mean[which] = 0.9 * self.mean[which] + 0.1 * gradient
        self.square[which] = 0.999 * self.square[which] + 0.001 * gradient**2
        t = _over_pixels(self.steps[which].double(), gradient)
        rate = learning_rate * torch.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        self.w[which] -= rate * self.mean[which] / (torch.sqrt(self.square[which]) + 1e-8)


def _over_pixels(values: Tensor, images: Tensor) -> Tensor:
    """One value per image (N,) in a shape that broadcasts over the images (N, ...)."""
    return values.reshape(-1, *[1] * (images.ndim - 1))
