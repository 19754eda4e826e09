"""An attack on projections onto a generator's range, by way of the generator's latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.config import ART_NUMPY_DTYPE
from art.estimators.classification import PyTorchClassifier
from torch import Tensor
from tqdm import tqdm

from art_pixeldefend.attacks import losses
from art_pixeldefend.attacks.budget import scalar_clip_values
from art_pixeldefend.attacks.through import NORMS, Best, Evaluator, labels_of, projected, purifiers_of
from art_pixeldefend.attacks.training import frozen
from art_pixeldefend.purifiers.logits import differentiable_logits
from art_pixeldefend.purifiers.manifold_projection import ManifoldProjection
from art_pixeldefend.purifiers.purified_model import PurifiedModel
from art_pixeldefend.validation import check_attributes, check_bool, check_choice, check_count, check_number, check_seed

CONFIDENCE = 5.0  # a larger margin of the generator's image is not rewarded


class LatentAttack(EvasionAttack):
    """Attack a classifier behind :class:`~art_pixeldefend.ManifoldProjection` through the generator's latents.

    Gradients through a projection hold in the neighbourhood of one local minimum only. This attack looks for the
    minimum to which it wants an image to be projected, an image G(z) that is misclassified, and moves the image as far
    towards it as the ball allows:

        minimise over z  -min(margin(f(G(z))), 5) + weight |G(z) - x'|^2,  x' the point of the ball closest to G(z),

    from the latents closest to x. Whether the defence is fooled is judged by projecting x' as it does (Athalye et al.
    2018, arXiv:1802.00420, attack Defense-GAN in this way).

    Args:
        estimator: a PyTorch classifier with clip values whose outputs are logits, and which purifies by one
            ``ManifoldProjection``: as a preprocessing defence, or with a :class:`~art_pixeldefend.PurifiedModel` as
            its model.
        norm: ``"Linf"`` or ``"L2"``.
        eps: radius, in the units of the estimator's clip values.
        steps: of Adam, for each weight.
        learning_rate: of Adam.
        weights: of the distance, tried in turn on images that are not fooled yet.
        checks: how often in the steps of one weight x' is projected and judged.
        draws: of the projection's random starts that judge an image; None for 5 if there are any, otherwise 1.
        seed: of the random numbers; None for a new one at every call.
        batch_size: most images, times draws, at a time.
        verbose: show a progress bar.

    Attributes:
        success, success_rate, queries, fallen_at: as of :class:`~art_pixeldefend.attacks.AdaptivePGD`; queries are
            images that were projected and classified.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from torch import nn
        >>> from art_pixeldefend import ManifoldProjection
        >>> from art_pixeldefend.models.generator import VAE
        >>> purifier = ManifoldProjection(VAE((1, 4, 4), latent_size=3), steps=5)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
        >>> classifier = PyTorchClassifier(
        ...     model, nn.CrossEntropyLoss(), (1, 4, 4), 10, clip_values=(0, 1), preprocessing_defences=[purifier]
        ... )
        >>> attack = LatentAttack(classifier, eps=0.1, steps=10, seed=0)
        >>> attack.generate(np.full((2, 1, 4, 4), 0.5, np.float32)).shape
        (2, 1, 4, 4)
    """

    attack_params = [
        *EvasionAttack.attack_params, "norm", "eps", "steps", "learning_rate", "weights", "checks", "draws", "seed",
        "batch_size", "verbose",
    ]  # fmt: skip
    _estimator_requirements = (PyTorchClassifier,)

    def __init__(
        self,
        estimator: Any,
        *,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 200,
        learning_rate: float = 0.05,
        weights: Sequence[float] = (1.0, 0.1, 10.0),
        checks: int = 10,
        draws: int | None = None,
        seed: int | None = None,
        batch_size: int = 128,
        verbose: bool = False,
    ) -> None:
        super().__init__(estimator=estimator)
        self.norm, self.eps, self.steps, self.learning_rate = norm, eps, steps, learning_rate
        self.weights, self.checks, self.draws = weights, checks, draws
        self.seed, self.batch_size, self.verbose = seed, batch_size, verbose
        self._check_params()

    @property
    def projection(self) -> ManifoldProjection:
        """The estimator's purifier."""
        (purifier,) = purifiers_of(self.estimator)
        assert isinstance(purifier, ManifoldProjection)
        return purifier

    def generate(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
        """Attack images; of an image that is never misclassified the one with the largest margin is returned.

        Args:
            x: images (N, C, H, W) within the clip values.
            y: labels to get away from, class numbers (N,) or one-hot; by default the classifier's own predictions.
        """
        x = x.astype(ART_NUMPY_DTYPE)
        evaluator = Evaluator(
            self.estimator, labels_of(self.estimator, x, y, self.batch_size), self.seed, self.batch_size
        )
        draws = self.draws or (5 if evaluator.random else 1)
        clean, model = evaluator.to_unit(x), self.projection.model
        best = Best(clean)
        checked = sorted({self.steps * check // self.checks for check in range(1, self.checks + 1)} - {0})

        def left() -> Sequence[Tensor]:
            return (best.rate < 1).nonzero().squeeze(1).split(self.batch_size)

        with frozen(self.estimator), model.evaluating():
            if len(x):
                everyone = torch.arange(len(x), device=clean.device)
                best.keep(clean, everyone, evaluator(clean, everyone, draws), 0)
            start = clean.new_zeros(len(x), model.latent_size, dtype=model.dtype)
            for index in left():
                start[index] = self._closest(clean[index]).to(start)
            total = len(self.weights) * self.steps
            with tqdm(total=total, unit="step", desc="attack", disable=not self.verbose) as bar:
                for number, weight in enumerate(self.weights):
                    for index in left():
                        path = self._ascent(start[index], clean[index], evaluator.y[index], weight)
                        for step in checked:
                            with torch.no_grad():
                                points = self._nearest(model(path[step - 1]), clean[index]).to(clean)
                            best.keep(points, index, evaluator(points, index, draws), number * self.steps + step)
                    bar.update(self.steps)
        self.success_rate = best.rate.cpu().numpy()
        self.success, self.fallen_at = self.success_rate > 0.5, best.fallen_at.cpu().numpy()
        self.queries = evaluator.queries.cpu().numpy()
        return evaluator.from_unit(best.images, x)

    def _closest(self, x: Tensor) -> Tensor:
        """The latents (M, L) of images close to ``x``, by Adam from the encoder's, or from 0."""
        model = self.projection.model
        with torch.no_grad():
            unit = x.to(model.device, model.dtype)
            start = model.encode(unit) if model.encodes else unit.new_zeros(len(x), model.latent_size)
        return self._descend(start, self.steps // 2, lambda z: (model(z) - unit).square().sum())[-1]

    def _ascent(self, z: Tensor, x: Tensor, y: Tensor, weight: float) -> list[Tensor]:
        """The latents after every step of the attack on images ``x`` of labels ``y``."""

        def objective(z: Tensor) -> Tensor:
            image = self.projection.model(z)
            nearest = self._nearest(image.detach(), x)
            margin = losses.margin(self._logits(image.clamp(0, 1)), y)
            return (weight * (image - nearest).square().flatten(1).sum(1) - margin.clamp_max(CONFIDENCE)).sum()

        return self._descend(z, self.steps, objective)

    def _nearest(self, images: Tensor, x: Tensor) -> Tensor:
        """The points of the balls around ``x`` that are closest to ``images``."""
        low, high = scalar_clip_values(self.estimator)
        return projected(images, x.to(images), self.eps / (high - low), self.norm)

    def _descend(self, z: Tensor, steps: int, objective: Any) -> list[Tensor]:
        """The latents after every step."""
        z = z.detach().clone().to(self.projection.model.device).requires_grad_()
        optimizer, path = torch.optim.Adam([z], self.learning_rate), [z.detach().clone()]
        for _ in range(steps):
            with torch.enable_grad():
                z.grad = torch.autograd.grad(objective(z), z)[0].nan_to_num()
            optimizer.step()
            path.append(z.detach().clone())
        return path[1:] or path

    def _logits(self, unit: Tensor) -> Tensor:
        """The classifier's logits for images in [0, 1] that are not projected."""
        module = self.estimator.model
        if isinstance(module, PurifiedModel):
            return module.model(unit)
        low, high = scalar_clip_values(self.estimator)
        purifier = self.projection
        try:
            purifier._apply_predict = False
            return differentiable_logits(self.estimator, (unit * (high - low) + low).float())
        finally:
            purifier._apply_predict = True

    def _check_params(self) -> None:
        scalar_clip_values(self.estimator)
        found = purifiers_of(self.estimator)
        inside = any(isinstance(m, PurifiedModel) for m in self.estimator.model.modules())
        if [type(p) for p in found] != [ManifoldProjection] or (
            inside and not isinstance(self.estimator.model, PurifiedModel)
        ):
            raise ValueError("estimator must purify by one ManifoldProjection")
        check_choice("norm", self.norm, NORMS)
        check_attributes(self, check_number, "eps", "learning_rate")
        check_attributes(self, check_count, "steps", "checks", "batch_size")
        try:
            self.weights = tuple(check_number("weights", weight) for weight in self.weights)
        except TypeError:
            raise ValueError(f"weights must be numbers, got {self.weights!r}") from None
        if not self.weights:
            raise ValueError("weights must be at least one number, got none")
        if self.draws is not None:
            self.draws = check_count("draws", self.draws)
        self.seed = check_seed("seed", self.seed)
        check_bool("verbose", self.verbose)
