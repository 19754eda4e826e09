"""The Square attack, which needs no gradients, on defences with and without random numbers."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.config import ART_NUMPY_DTYPE
from art.estimators.classification import PyTorchClassifier
from torch import Tensor
from tqdm import tqdm

from art_pixeldefend.attacks.budget import scalar_clip_values
from art_pixeldefend.attacks.through import Evaluator, labels_of, projected
from art_pixeldefend.validation import check_attributes, check_bool, check_count, check_number, check_seed

DRAWS = 20
SCHEDULE_STEPS = 10_000
SCHEDULE = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of these steps, after which areas are halved


class Square(EvasionAttack):
    """Search for an L-infinity perturbation made of squares (Andriushchenko et al. 2020, arXiv:1912.00049).

    Every step adds a square of random sign and place to the perturbation, and keeps it if the margin grows. Where the
    defence draws random numbers, ART's attack and AutoAttack's compare margins of different draws and stop at the first
    draw that is misclassified, which overstates the attack's success and wastes its queries. Here all images of a
    search are compared by the mean margin over the same draws, a search ends when all of them are misclassified, and
    ``success`` is judged by others. One random perturbation per image: results do not depend on ``batch_size``.

    Args:
        estimator: a PyTorch classifier with clip values whose outputs are logits.
        eps: radius, in the units of the estimator's clip values.
        steps: for each image, of ``draws`` queries each.
        draws: whose mean margin is compared; None for 20 if a purifier draws random numbers, otherwise 1.
        area: share of the image that the first squares cover.
        seed: of the random numbers; None for a new one at every call.
        batch_size: most images, times draws, that the classifier gets at a time.
        verbose: show a progress bar.

    Attributes:
        success, success_rate, queries: as of :class:`~art_pixeldefend.attacks.AdaptivePGD`.
        fallen_at: (N,), the number of steps after which all draws misclassified an image: 0 for the clean image; -1 for
            never.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1))
        >>> x = np.full((2, 1, 8, 8), 0.5, np.float32)
        >>> attack = Square(classifier, eps=0.1, steps=50, seed=0)
        >>> attack.generate(x).shape, attack.success.shape
        ((2, 1, 8, 8), (2,))
    """

    attack_params = [*EvasionAttack.attack_params, "eps", "steps", "draws", "area", "seed", "batch_size", "verbose"]
    _estimator_requirements = (PyTorchClassifier,)

    def __init__(
        self,
        estimator: Any,
        *,
        eps: float = 8 / 255,
        steps: int = 1000,
        draws: int | None = None,
        area: float = 0.8,
        seed: int | None = None,
        batch_size: int = 128,
        verbose: bool = False,
    ) -> None:
        super().__init__(estimator=estimator)
        self.eps, self.steps, self.draws, self.area = eps, steps, draws, area
        self.seed, self.batch_size, self.verbose = seed, batch_size, verbose
        self._check_params()

    def generate(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
        """Attack images (N, C, H, W); those that no query fooled are returned with the largest margin found.

        Args:
            x: images within the clip values.
            y: labels to get away from, class numbers (N,) or one-hot; by default the classifier's own predictions.
        """
        x = x.astype(ART_NUMPY_DTYPE)
        evaluator = Evaluator(
            self.estimator, labels_of(self.estimator, x, y, self.batch_size), self.seed, self.batch_size
        )
        draws = self.draws or (DRAWS if evaluator.random else 1)
        clean = evaluator.to_unit(x)
        with torch.no_grad():
            best, self.fallen_at = self._search(evaluator, clean, draws) if len(x) else (clean, np.zeros(0, int))
            everyone = torch.arange(len(x), device=best.device)
            rate = evaluator(best, everyone, draws, (1,)).rate if len(x) else torch.zeros(0)
        self.success_rate = rate.cpu().numpy()
        self.success = self.success_rate > 0.5
        self.queries = evaluator.queries.cpu().numpy()
        return evaluator.from_unit(best, x)

    def _search(self, evaluator: Evaluator, clean: Tensor, draws: int) -> tuple[Tensor, np.ndarray]:
        """The images with the largest margin found, in [0, 1], and the steps after which they fell."""
        best, eps = clean.clone(), self.eps / evaluator.scale
        found = evaluator(clean, torch.arange(len(clean), device=clean.device), draws)
        margin, fallen_at = found.margin, torch.where(found.rate == 1, 0, -1)
        rngs = [np.random.default_rng([evaluator.seed, i]) for i in range(len(clean))]
        for step in tqdm(range(self.steps), unit="step", desc="square", disable=not self.verbose):
            index = (fallen_at < 0).nonzero().squeeze(1)
            if not len(index):
                break
            proposed = [self._proposal(rngs[i], tuple(clean.shape[1:]), step) for i in index.tolist()]
            change = eps * torch.from_numpy(np.stack(proposed)).to(clean)
            points = projected(best[index] + change, clean[index], eps, "Linf")
            found = evaluator(points, index, draws)
            better = (found.margin > margin[index]) | (found.rate == 1)
            best[index[better]], margin[index[better]] = points[better], found.margin[better]
            fallen_at[index[found.rate == 1]] = step + 1
        return best, fallen_at.cpu().numpy()

    def _proposal(self, rng: np.random.Generator, shape: tuple[int, ...], step: int) -> np.ndarray:
        """A change (C, H, W) in radii: vertical stripes in the first step, then twice the radius in a square."""
        channels, height, width = shape
        if step == 0:
            return np.broadcast_to(rng.choice((-1.0, 1.0), (channels, 1, width)), shape).copy()
        halvings = bisect_left(SCHEDULE, step * SCHEDULE_STEPS / self.steps)
        side = round(math.sqrt(self.area * height * width / 2**halvings))
        side = max(1, min(side, height, width))
        top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
        change = np.zeros(shape)
        change[:, top : top + side, left : left + side] = rng.choice((-2.0, 2.0), (channels, 1, 1))
        return change

    def _check_params(self) -> None:
        scalar_clip_values(self.estimator)
        self.eps = check_number("eps", self.eps)
        self.area = check_number("area", self.area, 0.0, 1.0)
        check_attributes(self, check_count, "steps", "batch_size")
        if self.draws is not None:
            self.draws = check_count("draws", self.draws)
        self.seed = check_seed("seed", self.seed)
        check_bool("verbose", self.verbose)
