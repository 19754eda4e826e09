"""Training a classifier further, and adapting it to the images that a purifier returns."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from art.defences.trainer import Trainer
from art.estimators.classification import PyTorchClassifier
from tqdm import tqdm

from art_pixeldefend.classifiers.training import Recipe, batches, flip, seeded
from art_pixeldefend.purifiers.base import Purifier
from art_pixeldefend.validation import check_count

Prepare = Callable[[np.ndarray], np.ndarray]
Finish = Callable[[int], None]
TUNING = Recipe(400, learning_rate=0.02, weight_decay=1e-4)


class RecipeTrainer(Trainer):
    """Base class of trainers that change a trained classifier in place for a few hundred steps by a recipe.

    A subclass implements :meth:`_begin`. The classifier's optimiser is left alone.

    Args:
        classifier: an ART classifier.
        recipe: how long and how fast; ``crops`` and ``mixed_precision`` are not used.
        seed: of order, flips and everything else that is random.
        verbose: show a progress bar.

    Raises:
        ValueError: naming the argument that is not as described.
    """

    def __init__(self, classifier: PyTorchClassifier, recipe: Recipe, *, seed: int, verbose: bool) -> None:
        if not isinstance(classifier, PyTorchClassifier):
            raise ValueError(f"classifier must be an ART PyTorchClassifier, got {type(classifier).__name__}")
        if not any(parameter.requires_grad for parameter in classifier.model.parameters()):
            raise ValueError("classifier must have parameters that require gradients")
        super().__init__(classifier)
        self.recipe, self.seed, self.verbose = recipe, check_count("seed", seed, 0), verbose

    def fit(self, x: np.ndarray, y: np.ndarray, **kwargs: Any) -> None:
        """Train the classifier.

        Args:
            x: images (N, C, H, W) or (N, H, W, C) in the classifier's value range.
            y: class numbers (N,), or one-hot (N, classes).
            kwargs: further arguments of the classifier's ``fit``.

        Raises:
            ValueError: for images without labels, or none at all.
            FloatingPointError: if training diverged.
        """
        if len(x) != len(y) or not len(x):
            raise ValueError(f"x and y must have the same number of images, at least 1, got {len(x)} and {len(y)}")
        model, found = self.classifier.model, self.classifier.optimizer
        optimizer = self.recipe.optimizer(p for p in model.parameters() if p.requires_grad)
        scheduler = self.recipe.scheduler(optimizer)
        prepare, finish = self._begin(optimizer)
        columns = -1 if self.classifier.channels_first else -2
        try:
            self.classifier.set_params(optimizer=optimizer)
            with seeded(self.seed), tqdm(total=self.recipe.steps, unit="step", disable=not self.verbose) as bar:
                for step, batch in enumerate(batches(len(x), self.recipe, self.seed), 1):
                    images = prepare(flip(x[batch.ids], batch.flips, columns))
                    self.classifier.fit(
                        images, y[batch.ids], batch_size=len(images), nb_epochs=1, scheduler=scheduler, **kwargs
                    )
                    finish(step)
                    bar.update()
        finally:
            self.classifier.set_params(optimizer=found)
            model.eval()
        if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
            raise FloatingPointError("training diverged; lower the recipe's learning_rate")

    @abstractmethod
    def _begin(self, optimizer: torch.optim.Optimizer) -> tuple[Prepare, Finish]:
        """Return what is done to each batch of images before its step, and what is done after it."""


class PurifiedTrainer(RecipeTrainer):
    """Train a classifier for a few hundred steps on purified images, so that it fits the purifier in front of it.

    Purified images are smoother than those that a classifier was trained on. Each step purifies a fresh batch with
    fresh random numbers; the weights of the classifier change in place, its optimiser is left alone.

    Args:
        classifier: a trained ART classifier. If the purifier is among its preprocessing defences, that one must not
            be applied in training (``apply_fit``).
        purifier: purifies images in the classifier's value range. To tune for randomized smoothing with a
            ``ScoreDenoiser``, take a ``ScorePurifier`` of the same model: it adds the noise, too.
        vary: (lowest, highest) by name of parameters of the purifier, of which every batch gets a uniform draw:
            ``{"sigma": (0.1, 0.5)}``.
        recipe: how long and how fast; ``crops`` and ``mixed_precision`` are not used.
        seed: of order, flips, parameters, and the purifier's random numbers.
        verbose: show a progress bar.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> import numpy as np
        >>> from art_pixeldefend import ScorePurifier, classifiers, datasets
        >>> digits = datasets.load("digits")
        >>> classifier = classifiers.as_art(classifiers.build("resnet", (1, 8, 8), units=1))
        >>> purifier = ScorePurifier("digits-score", sigma=0.25)
        >>> recipe = classifiers.Recipe(steps=5, learning_rate=0.02, flips=False)
        >>> trainer = classifiers.PurifiedTrainer(classifier, purifier, {"sigma": (0.1, 0.4)}, recipe)
        >>> trainer.fit(digits.x_train.astype(np.float32) / 255, digits.y_train)
    """

    def __init__(
        self,
        classifier: PyTorchClassifier,
        purifier: Purifier,
        vary: Mapping[str, tuple[float, float]] | None = None,
        recipe: Recipe = TUNING,
        *,
        seed: int = 0,
        verbose: bool = False,
    ) -> None:
        if not isinstance(purifier, Purifier):
            raise ValueError(f"purifier must be a Purifier, got {type(purifier).__name__}")
        super().__init__(classifier, recipe, seed=seed, verbose=verbose)
        if any(isinstance(d, Purifier) and d.apply_fit for d in classifier.preprocessing_defences or ()):
            raise ValueError("classifier must not purify in training itself: set apply_fit=False in its defence")
        self.purifier, self.vary = purifier, dict(vary or {})
        for name, ends in self.vary.items():
            if name not in purifier.params or len(ends) != 2 or not ends[0] <= ends[1]:
                raise ValueError(
                    f"vary must map parameters of the purifier to (lowest, highest), got {name!r}: {ends!r}"
                )
            for end in ends:
                copy.copy(purifier).set_params(**{name: end})

    def _begin(self, optimizer: torch.optim.Optimizer) -> tuple[Prepare, Finish]:
        purifier, rng = copy.copy(self.purifier), np.random.default_rng(self.seed)
        purifier.seed = None  # fresh random numbers for every batch

        def prepare(images: np.ndarray) -> np.ndarray:
            purifier.set_params(**{name: rng.uniform(*ends) for name, ends in self.vary.items()})
            return purifier(images)[0]

        return prepare, lambda step: None
