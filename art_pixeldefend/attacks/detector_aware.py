"""An attack that knows the detector: it fools a classifier with images that are not flagged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.config import ART_NUMPY_DTYPE
from art.estimators.classification import PyTorchClassifier
from torch import Tensor

from art_pixeldefend.attacks import losses
from art_pixeldefend.attacks.adaptive_pgd import SELECTION_DRAWS, AdaptivePGD
from art_pixeldefend.attacks.budget import scalar_clip_values
from art_pixeldefend.attacks.through import Evaluator, is_random, labels_of, per_image
from art_pixeldefend.detectors import ConformalDetector, Likelihood
from art_pixeldefend.levels import Images, to_levels
from art_pixeldefend.purifiers import AdaptivePixelDefend
from art_pixeldefend.validation import check_count, check_number

SELECTIVE, ORTHOGONAL = "selective", "orthogonal"
METHODS: tuple[str | float, ...] = (SELECTIVE, ORTHOGONAL, 0.1, 1.0, 10.0)
ENOUGH = 1.0  # a margin of logits beyond which a weighted sum gains nothing
MOMENTUM = 0.75
RAISED = 1e3  # added to the objective of misclassified images, whose detection is then reduced


class DetectorAware(EvasionAttack):
    """Fool a classifier with images that a detector does not flag.

    The attack maximises the classifier's margin m(x), the largest other logit minus the label's, subject to p(x) >
    alpha, with gradients of both through :class:`AdaptivePGD`. The detector's part d(x), about log(alpha / p), is
    :meth:`~art_pixeldefend.detectors.ConformalDetector.margin`. Several methods are tried in turn on the images on
    which the earlier ones failed:

    - a number w: the sum min(m, 1) - w max(d, 0), the penalty method of Carlini and Wagner (2017, arXiv:1705.07263);
      several numbers are a sweep of w.
    - ``"selective"``: the gradient of m until the image is misclassified, then that of -d, in turn (Bryniarski et al.
      2021, arXiv:2106.15023).
    - ``"orthogonal"``: the same, each gradient projected to be orthogonal to the other one, so that a step towards one
      aim does not undo the other (the same authors).

    Images are rounded to 8 bits before :meth:`~art_pixeldefend.detectors.ConformalDetector.detect` decides. With
    :class:`AdaptivePixelDefend` in place of a detector the attack makes misclassified images of fewer bits per
    dimension than its threshold, which it does not purify; ``estimator`` is then the classifier without it. If
    ``estimator`` purifies, the attack is one on purification and detection together.

    Args:
        estimator: a PyTorch classifier with clip values whose outputs are logits.
        detector: a fitted :class:`~art_pixeldefend.detectors.ConformalDetector`, or an
            :class:`~art_pixeldefend.AdaptivePixelDefend`.
        norm: ``"Linf"`` or ``"L2"``.
        eps: radius, in the units of the estimator's clip values.
        steps: gradient steps of each method.
        methods: those to try, in order.
        step_size: the largest change of a value in the first step, as ``eps``; it falls to 0. By default ``eps``.
        eot: draws of stochastic purifiers and scores whose gradients are averaged.
        gradient: the purifiers' backward pass, as for :class:`AdaptivePGD`.
        seed: of the random numbers; None for a new one at every call.
        batch_size: most images, times draws, at a time.
        verbose: show progress bars.

    Attributes:
        success: (N,), whether an image that :meth:`generate` returned is misclassified by ``estimator.predict`` and not
            flagged by ``detector.detect``, which are given all images at once; in more than half of ten draws where
            the random numbers of the estimator or the detector have no seed.
        methods_used: (N,), the position in ``methods`` of the one that succeeded; -1 for none.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from torch import nn
        >>> from art_pixeldefend import datasets
        >>> data, detector = datasets.load("digits"), ConformalDetector(Likelihood("digits"))
        >>> detector.fit(data.x_test[200:].astype(np.float32) / 255)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1))
        >>> x = data.x_test[:4].astype(np.float32) / 255
        >>> attack = DetectorAware(classifier, detector, eps=8 / 255, steps=3, methods=["selective"], seed=0)
        >>> attacked = attack.generate(x)
        >>> bool(abs(attacked - x).max() < 8.001 / 255), attack.success.shape
        (True, (4,))
    """

    attack_params = [
        *EvasionAttack.attack_params, "detector", "norm", "eps", "steps", "methods", "step_size", "eot", "gradient",
        "seed", "batch_size", "verbose",
    ]  # fmt: skip
    _estimator_requirements = (PyTorchClassifier,)

    def __init__(
        self,
        estimator: Any,
        detector: ConformalDetector | AdaptivePixelDefend,
        *,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 50,
        methods: Sequence[str | float] = METHODS,
        step_size: float | None = None,
        eot: int = 1,
        gradient: Any = None,
        seed: int | None = None,
        batch_size: int = 128,
        verbose: bool = False,
    ) -> None:
        super().__init__(estimator=estimator)
        self.detector, self.norm, self.eps, self.steps, self.methods = detector, norm, eps, steps, methods
        self.step_size, self.eot, self.gradient, self.seed = step_size, eot, gradient, seed
        self.batch_size, self.verbose = batch_size, verbose
        self._check_params()

    def generate(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
        """Attack images; one for which every method fails is returned as the last method left it.

        Args:
            x: 8-bit images (N, C, H, W) or (N, H, W, C) within the clip values, as the estimator takes them.
            y: labels to get away from, class numbers (N,) or one-hot; by default the classifier's own predictions.

        Raises:
            ValueError: naming ``x``, if they are not 8-bit images.
        """
        x = x.astype(ART_NUMPY_DTYPE)
        labels = labels_of(self.estimator, x, y, self.batch_size).cpu().numpy()
        attacked = x.copy()
        self.methods_used = np.full(len(x), -1)
        self.success = np.zeros(len(x), bool)
        for position, method in enumerate(self.methods):
            left = ~self.success
            if not left.any():
                break
            attacked[left] = self._attack(method).generate(x, labels, start=x, only=left)[left]
            self.success = self._succeeds(attacked, labels, position)
            self.methods_used[left & self.success] = position
        self.methods_used[~self.success] = -1
        return attacked

    def _attack(self, method: str | float) -> AdaptivePGD:
        """The attack by one method."""
        objective = _Objective(self._constraint(), method, self.estimator, self.seed)
        stochastic = isinstance(self.detector, ConformalDetector) and any(s.stochastic for s in self.detector._scores)
        return AdaptivePGD(
            self.estimator, norm=self.norm, eps=self.eps, steps=self.steps,
            step_size=self.eps if self.step_size is None else self.step_size,
            schedule="cosine", along="gradient", momentum=MOMENTUM, loss=objective,
            success_criterion=objective.succeeds, eot=self.eot, gradient=self.gradient,
            selection_draws=None if stochastic or self.eot > 1 or is_random(self.estimator) else 1,
            round_to_levels=True,
            seed=self.seed, batch_size=self.batch_size, verbose=self.verbose,
        )  # fmt: skip

    def _succeeds(self, attacked: np.ndarray, labels: np.ndarray, position: int) -> np.ndarray:
        """Whether images at their places are misclassified and not flagged, after the method at ``position``."""
        if not is_random(self.estimator):
            wrong = self.estimator.predict(attacked, batch_size=self.batch_size).argmax(axis=1) != labels
        else:
            y = torch.from_numpy(labels).to(self.estimator.device)
            evaluator, everyone = Evaluator(self.estimator, y, self.seed, self.batch_size), torch.arange(len(y)).to(y)
            wrong = evaluator(evaluator.to_unit(attacked), everyone, SELECTION_DRAWS, (position,)).rate.cpu().numpy()
        return wrong * (1 - self._flagged(attacked)) > 0.5 if wrong.any() else np.zeros(len(attacked), bool)

    def _flagged(self, attacked: np.ndarray) -> np.ndarray:
        """The share of draws in which images at their places are flagged, one draw unless they differ."""
        images = torch.from_numpy(attacked)
        if isinstance(self.detector, AdaptivePixelDefend):
            constraint, parts = self._constraint(), _to_unit(images, self.estimator).split(self.batch_size)
            with torch.no_grad():
                return np.concatenate([constraint.flagged_of(constraint.scores_of(x).cpu().numpy()) for x in parts])
        levels = to_levels(_to_unit(images, self.estimator))
        given = Images(self.detector.image_shape, self.detector.clip_values).from_levels(levels, images).numpy()
        draws = SELECTION_DRAWS if self.detector.seed is None else 1
        return np.mean([self.detector.detect(given, batch_size=self.batch_size)[1] for _ in range(draws)], axis=0)

    def _constraint(self) -> Any:
        return _Threshold(self.detector) if isinstance(self.detector, AdaptivePixelDefend) else self.detector

    def _check_params(self) -> None:
        if not isinstance(self.detector, (ConformalDetector, AdaptivePixelDefend)):
            raise ValueError(
                f"detector must be a ConformalDetector or an AdaptivePixelDefend, got {type(self.detector).__name__}"
            )
        if isinstance(self.detector, ConformalDetector) and self.detector.calibration_scores is None:
            raise ValueError("detector must be fitted, with fit(x_calibration)")
        if not isinstance(self.methods, Sequence) or isinstance(self.methods, str) or not self.methods:
            raise ValueError(f"methods must be a sequence of names and numbers, got {self.methods!r}")
        for method in self.methods:
            if isinstance(method, str) and method not in (SELECTIVE, ORTHOGONAL):
                raise ValueError(f"methods must be numbers, {SELECTIVE!r} or {ORTHOGONAL!r}, got {method!r}")
            if not isinstance(method, str):
                check_number("methods", method)
        self.batch_size = check_count("batch_size", self.batch_size)
        self._attack(self.methods[0])  # checks the other arguments


class _Threshold:
    """The rule of Adaptive PixelDefend in the form of a detector: it purifies images of too many bits."""

    def __init__(self, purifier: AdaptivePixelDefend) -> None:
        self.score, self.threshold = Likelihood(purifier.pixel_cnn), purifier.threshold

    def scores_of(self, x: Tensor, *, start: int = 0, seed: int | None = None) -> Tensor:
        return self.score(x)[:, None]

    def margin_of(self, scores: Tensor) -> Tensor:
        return scores[:, 0] - self.threshold

    def flagged_of(self, scores: np.ndarray) -> np.ndarray:
        return ~(scores[:, 0] < self.threshold)


class _Objective:
    """What :class:`AdaptivePGD` maximises, and when an attack has succeeded."""

    def __init__(self, detector: Any, method: str | float, estimator: Any, seed: int | None) -> None:
        self.detector, self.method, self.estimator = detector, method, estimator
        self.random = np.random.default_rng(seed)  # of the seeds of stochastic scores
        self.scores = np.zeros((0, 1))

    def __call__(self, logits: Tensor, y: Tensor, images: Tensor) -> Tensor:
        """The objective of images (M, ...), which larger values are better for."""
        scores = self.detector.scores_of(_to_unit(images, self.estimator), seed=int(self.random.integers(2**62)))
        self.scores = scores.detach().cpu().numpy()
        margin, detection = losses.margin(logits, y), self.detector.margin_of(scores).to(logits)
        wrong = margin > 0
        if not isinstance(self.method, str):
            return margin.clamp(max=ENOUGH) - self.method * detection.clamp(min=0)
        objective = torch.where(wrong, RAISED - detection.clamp(min=0), margin)
        if self.method == SELECTIVE or not images.requires_grad:
            return objective
        towards, away = (torch.autograd.grad(part.sum(), images, retain_graph=True)[0] for part in (margin, detection))
        direction = torch.where(per_image(wrong, images), -_without(away, towards), _without(towards, away))
        linear = (images * direction).flatten(1).sum(1)
        return objective.detach() + linear - linear.detach()

    def succeeds(self, logits: Tensor, y: Tensor, images: Tensor) -> Tensor:
        """Whether images, those of the last call, are misclassified and not flagged."""
        return (logits.argmax(1) != y) & ~torch.from_numpy(self.detector.flagged_of(self.scores)).to(y.device)


def _without(gradient: Tensor, other: Tensor) -> Tensor:
    """The part of gradients (M, ...) that is orthogonal to others."""
    flat, along = gradient.flatten(1), other.flatten(1)
    share = (flat * along).sum(1) / along.square().sum(1).clamp_min(1e-30)
    return gradient - per_image(share, gradient) * other


def _to_unit(images: Tensor, estimator: Any) -> Tensor:
    """An estimator's images as (N, C, H, W) in [0, 1]."""
    low, high = scalar_clip_values(estimator)
    unit = ((images - low) / (high - low)).clamp(0, 1)
    return unit if estimator.channels_first else unit.movedim(-1, 1)
