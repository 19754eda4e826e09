"""Adversarial training on the range of a generator."""

from __future__ import annotations

import copy

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier

from art_pixeldefend.attacks.overpowered import OverpoweredAttack
from art_pixeldefend.classifiers.training import Recipe
from art_pixeldefend.classifiers.tuning import TUNING, Finish, Prepare, RecipeTrainer
from art_pixeldefend.validation import check_count, check_number


class ManifoldAdversarialTrainer(RecipeTrainer):
    """Train a classifier to agree on the pairs that the overpowered attack finds (Jalal et al. 2017, section 5.2).

        min over C of  E loss(C(x), y) + weight max over z, z' of D(C(G(z)), C(G(z'))),  |G(z) - G(z')| <= eta

    Ordinary steps on images alternate with steps on fresh pairs: after every ``every`` of them the attack searches for
    pairs, and one step lowers the mean of its D over the valid ones, with the batch normalisation's statistics fixed.
    The weights of the classifier change in place, its optimiser is left alone.

    Args:
        classifier: a trained ART classifier, the one that the attack attacks.
        attack: the attack; its ``seed`` is not used.
        pairs: number of pairs in a search (the authors: 50).
        every: ordinary steps between searches (the authors: a search every 5 epochs for MNIST).
        weight: of the pairs' loss (the authors: 0.01 for MNIST, 2 for CelebA, with Adam at 1e-4). A larger one leaves
            fewer confident pairs and a lower accuracy on clean images: with 0.2 a ResNet for Fashion-MNIST came to give
            nearly all images one class (``benchmarks/results/manifold-defense.md``). The authors begin with an
            adversarially trained classifier.
        recipe: how long and how fast; ``crops`` and ``mixed_precision`` are not used.
        seed: of order, flips and pairs.
        verbose: show a progress bar.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from art_pixeldefend import classifiers, datasets
        >>> from art_pixeldefend.attacks import OverpoweredAttack
        >>> from art_pixeldefend.models.generator import VAE
        >>> digits = datasets.load("digits")
        >>> classifier = classifiers.as_art(classifiers.build("resnet", (1, 8, 8), units=1))
        >>> attack = OverpoweredAttack(classifier, VAE((1, 8, 8), latent_size=8), max_iter=5)
        >>> recipe = classifiers.Recipe(steps=4, learning_rate=0.02, flips=False)
        >>> trainer = classifiers.ManifoldAdversarialTrainer(classifier, attack, pairs=4, every=2, recipe=recipe)
        >>> trainer.fit(digits.x_train.astype(np.float32) / 255, digits.y_train)
    """

    def __init__(
        self,
        classifier: PyTorchClassifier,
        attack: OverpoweredAttack,
        *,
        pairs: int = 50,
        every: int = 10,
        weight: float = 0.01,
        recipe: Recipe = TUNING,
        seed: int = 0,
        verbose: bool = False,
    ) -> None:
        super().__init__(classifier, recipe, seed=seed, verbose=verbose)
        if not isinstance(attack, OverpoweredAttack) or attack.estimator is not classifier:
            raise ValueError(f"attack must be an OverpoweredAttack of the same classifier, got {attack!r}")
        self.attack, self.weight = attack, check_number("weight", weight)
        self.pairs, self.every = check_count("pairs", pairs), check_count("every", every)

    def _begin(self, optimizer: torch.optim.Optimizer) -> tuple[Prepare, Finish]:
        attack, rng = copy.copy(self.attack), np.random.default_rng(self.seed)

        def finish(step: int) -> None:
            if step % self.every == 0:
                attack.seed = int(rng.integers(2**31))
                self._step(attack, optimizer)

        return lambda images: images, finish

    def _step(self, attack: OverpoweredAttack, optimizer: torch.optim.Optimizer) -> None:
        """One optimiser step on the valid pairs of a new search, if there are any."""
        pairs = attack.generate(count=self.pairs)
        images = torch.from_numpy(pairs.images[pairs.valid])
        if not len(images):
            return
        logits = attack.logits(images.flatten(0, 1).to(self.classifier.device)).unflatten(0, (len(images), 2))
        optimizer.zero_grad()
        (self.weight * attack.divergences(logits).mean()).backward()
        optimizer.step()
