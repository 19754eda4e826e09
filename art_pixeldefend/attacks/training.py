"""Attacks for adversarial training: FGSM and BIM with random radii (PixelDefend, Appendix B), and PGD."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.estimators.classification.classifier import ClassGradientsMixin
from art.estimators.estimator import BaseEstimator, LossGradientsMixin

from art_pixeldefend.attacks.budget import bim_steps, level
from art_pixeldefend.validation import check_number


class TrainingAttack(EvasionAttack):
    """Base class of attacks that are fast enough to be repeated at every training step.

    The attack uses the model's own predictions as labels, also when it is given others: ART's trainer passes the true
    labels, and a model trained on attacks made with those learns to infer the label from the perturbation (Kurakin et
    al. 2017, arXiv:1611.01236).

    Args:
        estimator: an ART classifier with loss gradients and clip values.
        delta: size of the radius, in levels.
        seed: of everything random.

    Raises:
        ValueError: if ``delta`` is not positive or the estimator has no clip values.
    """

    attack_params = [*EvasionAttack.attack_params, "delta", "seed"]
    _estimator_requirements = (BaseEstimator, LossGradientsMixin, ClassGradientsMixin)

    def __init__(self, estimator: Any, *, delta: float = 8, seed: int = 0) -> None:
        super().__init__(estimator=estimator)
        self.delta, self.seed = delta, seed
        self._check_params()
        self.rng = np.random.default_rng(seed)

    def generate(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
        """Attack images ``x`` (N, ...); ``y`` is ignored."""
        with frozen(self.estimator):
            predicted = self.estimator.predict(x, batch_size=len(x)).argmax(axis=1)
            labels = np.eye(self.estimator.nb_classes, dtype=np.float32)[predicted]
            return self._attack(x, labels, self._radii(len(x)))

    def _radii(self, count: int) -> np.ndarray:
        """Return radii (count,) in levels."""
        return np.full(count, float(self.delta))

    @abstractmethod
    def _attack(self, x: np.ndarray, labels: np.ndarray, radii: np.ndarray) -> np.ndarray:
        """Attack images against one-hot ``labels`` within ``radii``, in levels (N,)."""

    def _climb(self, x: np.ndarray, labels: np.ndarray, step: np.ndarray | float) -> np.ndarray:
        """Move ``step`` levels along the sign of the gradient, within the clip values."""
        sign = np.sign(self.estimator.loss_gradient(x, labels))
        step = np.reshape(step, (-1, *[1] * (x.ndim - 1)))
        return np.clip(x + step * level(self.estimator) * sign, *self.estimator.clip_values).astype(x.dtype)

    def _check_params(self) -> None:
        level(self.estimator)
        self.delta = check_number("delta", self.delta)
        if not self.delta > 0:
            raise ValueError(f"delta must be a positive number of levels, got {self.delta!r}")


@contextmanager
def frozen(estimator: Any) -> Iterator[None]:
    """Freeze a PyTorch estimator's parameters: their gradients would take a third of an attack's time."""
    model = getattr(estimator, "model", None)
    trained = [p for p in model.parameters() if p.requires_grad] if isinstance(model, torch.nn.Module) else []
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class HalfNormalAttack(TrainingAttack):
    """Attack every image within a random radius of its own, |N(0, delta)| truncated to [0, 2 delta].

    Arguments and errors are those of :class:`TrainingAttack`; ``delta`` is the standard deviation before truncation.
    """

    def _radii(self, count: int) -> np.ndarray:
        """Draw radii; those beyond the truncation are drawn again."""
        radii = np.abs(self.rng.normal(0, self.delta, count))
        while (beyond := radii > 2 * self.delta).any():
            radii[beyond] = np.abs(self.rng.normal(0, self.delta, beyond.sum()))
        return radii


class HalfNormalFGSM(HalfNormalAttack):
    """FGSM with a random radius per image: one step of the whole radius along the sign of the gradient.

    Arguments and errors are those of :class:`TrainingAttack`.

    Example:
        >>> from torch import nn
        >>> from art.defences.trainer import AdversarialTrainer
        >>> from art.estimators.classification import PyTorchClassifier
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 4, 4), 10, optimizer, clip_values=(0, 1))
        >>> trainer = AdversarialTrainer(classifier, HalfNormalFGSM(classifier, delta=8), ratio=0.5)
        >>> trainer.fit(np.full((8, 1, 4, 4), 0.5, np.float32), np.eye(10)[:8], batch_size=4, nb_epochs=1)
    """

    def _attack(self, x: np.ndarray, labels: np.ndarray, radii: np.ndarray) -> np.ndarray:
        return self._climb(x, labels, radii)


class HalfNormalBIM(HalfNormalAttack):
    """BIM with a random radius per image: steps of one level, clipped to the radius."""

    def _attack(self, x: np.ndarray, labels: np.ndarray, radii: np.ndarray) -> np.ndarray:
        attacked, steps = x.copy(), np.array([bim_steps(radius) for radius in radii])
        ball = (radii * level(self.estimator)).reshape(-1, *[1] * (x.ndim - 1))
        for done in range(steps.max(initial=0)):
            going = steps > done
            climbed = self._climb(attacked[going], labels[going], 1.0)
            attacked[going] = np.clip(climbed, x[going] - ball[going], x[going] + ball[going])
        return attacked


class TrainingPGD(TrainingAttack):
    """PGD within ``delta`` levels from a random start: :data:`STEPS` steps that reach 1.5 radii in all.

    Adversarial training of Madry et al. 2018, arXiv:1706.06083, with fewer steps. Arguments and errors are those of
    :class:`TrainingAttack`.
    """

    STEPS = 2

    def _attack(self, x: np.ndarray, labels: np.ndarray, radii: np.ndarray) -> np.ndarray:
        ball = (radii * level(self.estimator)).reshape(-1, *[1] * (x.ndim - 1))
        start = (x + self.rng.uniform(-ball, ball, x.shape)).astype(x.dtype)
        attacked = np.clip(start, *self.estimator.clip_values)
        for _ in range(self.STEPS):
            climbed = self._climb(attacked, labels, 1.5 * radii / self.STEPS)
            attacked = np.clip(climbed, x - ball, x + ball).astype(x.dtype)
        return attacked
