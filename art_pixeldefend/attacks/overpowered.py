"""The overpowered attack: pairs of similar images of a generator that a classifier treats differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from art.attacks.attack import Attack
from art.estimators.classification import PyTorchClassifier
from torch import Tensor

from art_pixeldefend.attacks.budget import scalar_clip_values
from art_pixeldefend.attacks.training import frozen
from art_pixeldefend.levels import as_tensor
from art_pixeldefend.models.generator import Generator
from art_pixeldefend.models.zoo import as_model
from art_pixeldefend.purifiers.logits import differentiable_logits
from art_pixeldefend.validation import check_attributes, check_choice, check_count, check_number

CHOICES = {
    "divergence": ("symmetric", "forward"),
    "distance": ("l2", "mean-square"),
    "optimizer": ("adam", "momentum"),
    "start": ("near", "normal", "uniform"),
}
MOMENTUM = 0.9
NEAR = 0.05  # deviation of z' - z at the start: from z' = z both would move alike for ever


@dataclass(frozen=True)
class Pairs:
    """What an overpowered attack found: N pairs of images (G(z), G(z')) and the classifier's answers.

    Attributes:
        latents: (N, 2, L), z and z'.
        images: (N, 2, C, H, W) in [0, 1].
        probabilities: (N, 2, classes), the classifier's.
        eta: the largest distance that is allowed.
    """

    latents: np.ndarray
    images: np.ndarray
    probabilities: np.ndarray
    eta: float

    @property
    def labels(self) -> np.ndarray:
        """The classes (N, 2) that the classifier predicts."""
        return self.probabilities.argmax(-1)

    @property
    def confidence(self) -> np.ndarray:
        """The probabilities (N, 2) of the predicted classes."""
        return self.probabilities.max(-1)

    @property
    def distance(self) -> np.ndarray:
        """L2 distances (N,) of the two images, in the [0, 1] range."""
        return np.linalg.norm((self.images[:, 0] - self.images[:, 1]).reshape(len(self.images), -1), axis=1)

    @property
    def divergence(self) -> np.ndarray:
        """KL(p | p') + KL(p' | p), (N,), in nats, of the two predictions."""
        p, log_p = self.probabilities, np.log(self.probabilities.clip(1e-30))
        return ((p[:, 0] - p[:, 1]) * (log_p[:, 0] - log_p[:, 1])).sum(-1)

    @property
    def valid(self) -> np.ndarray:
        """Whether a pair (N,) has different predicted classes within ``eta``."""
        return (self.labels[:, 0] != self.labels[:, 1]) & (self.distance <= self.eta * (1 + 1e-5))  # rounding

    def draw(self, path: str | PathLike[str], classes: Sequence[str] | None = None, count: int = 10) -> None:
        """Draw the first ``count`` valid pairs, one above the other, with their labels and confidences, as a PNG file.

        Args:
            path: the file.
            classes: names of the classes; by default their numbers.
            count: largest number of pairs.

        Raises:
            ValueError: if ``count`` is not positive, or no pair is valid.
            OSError: if the file cannot be written.
        """
        import io

        from matplotlib.figure import Figure

        from art_pixeldefend.files import write_atomically
        from art_pixeldefend.pictures import as_picture

        chosen = np.flatnonzero(self.valid)[: check_count("count", count)]
        if not len(chosen):
            raise ValueError("pairs must hold at least one valid pair to draw, they hold none")
        figure = Figure(figsize=(1.2 * len(chosen), 3))
        axes = figure.subplots(2, len(chosen), squeeze=False)
        for column, i in enumerate(chosen):
            for row in range(2):
                levels = np.rint(255 * self.images[i, row].clip(0, 1)).astype(np.uint8)
                label = int(self.labels[i, row])
                name = str(label) if classes is None else classes[label]
                axes[row, column].imshow(as_picture(levels), cmap="gray", vmin=0, vmax=255)
                axes[row, column].set_title(f"{name}\n{self.confidence[i, row]:.0%}", fontsize=8)
                axes[row, column].axis("off")
        figure.tight_layout()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        write_atomically(path, buffer.getvalue())


class OverpoweredAttack(Attack):
    """Find pairs of latents whose images are close and whose predictions differ most (Jalal et al. 2017, section 5).

        max over z, z' of D(C(G(z)), C(G(z')))  subject to  |G(z) - G(z')| <= eta

    by the Lagrangian: descent in z and z', ascent in a multiplier, which is clamped at 0. Each pair has its own
    multiplier and its own sum in the objective, so that it does not depend on the others. Of the pairs on the way, the
    valid one (different classes within ``eta``) with the largest divergence is kept. Both images are in the generator's
    range, where :class:`~art_pixeldefend.ManifoldProjection` does not change them: the attack is stronger than any
    that must keep to a given image. Any classifier of several classes has valid pairs at its decision boundary;
    compare their divergence and confidence, too.

    ``PRESETS`` holds the authors' settings for MNIST (20 latents) and CelebA (64 x 64, RGB):
    ``OverpoweredAttack(classifier, generator, **OverpoweredAttack.PRESETS["mnist"])``. Differences from their code:
    YellowFin, which chooses its own learning rate, is replaced by Adam; the multiplier is ascended without momentum;
    MNIST's was not clamped; CelebA's objective was a mean over the batch, and its ``eta`` is here the L2 norm of its
    mean square difference of 0.001; its pairs began with z' = z exactly.

    | Paper link: https://arxiv.org/abs/1712.09196

    Args:
        estimator: a PyTorch classifier with clip values, whose outputs are logits. Its defences are attacked, too.
        generator: a :class:`Generator`, the name of a bundled one, or the path of one.
        eta: largest L2 distance of the two images, in the [0, 1] range.
        max_iter: steps.
        learning_rate: of the latents.
        optimizer: ``"adam"``, or ``"momentum"`` with momentum 0.9.
        divergence: D, the cross-entropy of C(G(z')) against C(G(z)): ``"forward"``, or ``"symmetric"``, summed over
            both directions.
        distance: in the constraint: ``"l2"``, or ``"mean-square"``, over sub-pixels.
        multiplier: its first value.
        multiplier_rate: size of its steps.
        prior: weight of |z| + |z'| in the objective.
        start: of the pairs: ``"normal"``, both drawn from the prior; ``"uniform"``, both from [0, 1]; ``"near"``, z
            from the prior and z' close to it.
        batch_size: pairs at a time.
        seed: of the starts.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from art_pixeldefend.models.generator import VAE
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
        >>> classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 4, 4), 10, clip_values=(0, 1))
        >>> pairs = OverpoweredAttack(classifier, VAE((1, 4, 4), latent_size=3), eta=0.5, max_iter=20).generate(count=5)
        >>> pairs.images.shape, pairs.valid.shape
        ((5, 2, 1, 4, 4), (5,))
    """

    PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
        {
            "mnist": {
                "eta": 1.5, "max_iter": 500, "learning_rate": 0.01, "optimizer": "adam", "divergence": "forward",
                "distance": "l2", "multiplier": 1.0, "multiplier_rate": 1e-4, "prior": 1e-4, "start": "uniform",
            },
            "celeba": {
                "eta": 3.5, "max_iter": 500, "learning_rate": 0.1, "optimizer": "momentum", "divergence": "symmetric",
                "distance": "mean-square", "multiplier": 250.0, "multiplier_rate": 10.0, "prior": 0.0, "start": "near",
            },
        }
    )  # fmt: skip
    attack_params = [
        *Attack.attack_params, "eta", "max_iter", "learning_rate", "optimizer", "divergence", "distance", "multiplier",
        "multiplier_rate", "prior", "start", "batch_size", "seed",
    ]  # fmt: skip
    _estimator_requirements = (PyTorchClassifier,)

    def __init__(
        self,
        estimator: Any,
        generator: Generator | str | PathLike[str],
        *,
        eta: float = 1.5,
        max_iter: int = 200,
        learning_rate: float = 0.05,
        optimizer: str = "adam",
        divergence: str = "symmetric",
        distance: str = "l2",
        multiplier: float = 1.0,
        multiplier_rate: float = 0.1,
        prior: float = 0.0,
        start: str = "near",
        batch_size: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(estimator=estimator)
        self.generator: Generator = as_model(generator, Generator, estimator.device, name="generator")
        self.eta, self.max_iter, self.learning_rate, self.optimizer = eta, max_iter, learning_rate, optimizer
        self.divergence, self.distance, self.prior, self.start = divergence, distance, prior, start
        self.multiplier, self.multiplier_rate = multiplier, multiplier_rate
        self.batch_size, self.seed = batch_size, seed
        self._check_params()

    def generate(self, x: np.ndarray | None = None, *, count: int = 100) -> Pairs:
        """Search for pairs.

        Args:
            x: images (N, C, H, W) in the estimator's range: pairs begin at their encodings, z' beside z, instead of
                at ``start``. The generator must have an encoder.
            count: number of pairs, if ``x`` is not given.

        Raises:
            ValueError: naming ``x`` or ``count``, if it is not as described.
        """
        starts = self._starts(check_count("count", count)) if x is None else self._encoded(x)
        found = [self._search(some) for some in starts.split(self.batch_size)]
        latents, images, probabilities = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        return Pairs(latents, images, probabilities, self.eta)

    def logits(self, images: Tensor) -> Tensor:
        """Return the classifier's logits (M, classes) for images (M, C, H, W) in [0, 1]; differentiable."""
        low, high = scalar_clip_values(self.estimator)
        return differentiable_logits(self.estimator, (images * (high - low) + low).to(torch.float32))

    def divergences(self, logits: Tensor) -> Tensor:
        """Return D of pairs of predictions, (N,), from logits (N, 2, classes); differentiable."""
        log_p = logits.log_softmax(-1)
        forward = -(log_p[:, 0].exp() * log_p[:, 1]).sum(-1)
        if self.divergence == "forward":
            return forward
        return forward - (log_p[:, 1].exp() * log_p[:, 0]).sum(-1)

    def _starts(self, count: int) -> Tensor:
        rng = np.random.default_rng(self.seed)
        shape = (count, 2, self.generator.latent_size)
        z = torch.from_numpy(rng.random(shape) if self.start == "uniform" else rng.standard_normal(shape))
        if self.start == "near":
            z[:, 1] = z[:, 0] + NEAR * z[:, 1]
        return z.to(self.generator.device, self.generator.dtype)

    def _encoded(self, x: np.ndarray) -> Tensor:
        generator, tensor = self.generator, as_tensor(x)
        if not generator.encodes:
            raise ValueError(f"x must be None for a generator without encoder, {type(generator).__name__}")
        if not len(tensor) or tuple(tensor.shape[1:]) != generator.image_shape:
            raise ValueError(
                f"x must be images (N, {', '.join(map(str, generator.image_shape))}), N > 0, got {tuple(tensor.shape)}"
            )
        low, high = scalar_clip_values(self.estimator)
        with torch.no_grad(), generator.evaluating():
            z = generator.encode(((tensor - low) / (high - low)).to(generator.device, generator.dtype))
        noise = np.random.default_rng(self.seed).standard_normal(z.shape)
        return torch.stack((z, z + NEAR * torch.from_numpy(noise).to(z)), 1)

    def _search(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best pairs found from latents (N, 2, L): latents, images and probabilities."""
        with frozen(self.estimator), self.generator.evaluating(), torch.enable_grad():
            z = z.clone().requires_grad_()
            optimizer: torch.optim.Optimizer = (
                torch.optim.Adam([z], self.learning_rate)
                if self.optimizer == "adam"
                else torch.optim.SGD([z], self.learning_rate, MOMENTUM)
            )
            multiplier = torch.full((len(z),), self.multiplier, device=z.device, dtype=z.dtype)
            best, highest = z.detach().clone(), torch.full_like(multiplier, -torch.inf)
            for step in range(self.max_iter + 1):
                images = self.generator(z.flatten(0, 1)).unflatten(0, (len(z), 2))
                logits = self.logits(images.flatten(0, 1)).unflatten(0, (len(z), 2)).to(z.dtype)
                gap = images[:, 0] - images[:, 1]
                squared = gap.flatten(1).square().sum(1)
                with torch.no_grad():
                    divergence, labels = self.divergences(logits), logits.argmax(-1)
                    valid = (labels[:, 0] != labels[:, 1]) & (squared.sqrt() <= self.eta)
                    better = torch.where(valid, divergence, -torch.inf) > highest
                    kept = better | (
                        highest.isneginf() & z.isfinite().all(-1).all(-1)
                    )  # the last pair if none is valid
                    best[kept] = z.detach()[kept]
                    highest[better] = divergence[better]
                if step == self.max_iter:
                    break
                excess = self._excess(squared, gap[0].numel())
                loss = multiplier * excess - self.divergences(logits) + self.prior * z.norm(dim=-1).sum(-1)
                optimizer.zero_grad()
                z.grad = torch.autograd.grad(loss.sum(), z)[0]
                optimizer.step()
                multiplier = (multiplier + self.multiplier_rate * excess.detach()).clamp_min(0)
            with torch.no_grad():
                images = self.generator(best.flatten(0, 1))
                probabilities = self.logits(images).softmax(-1)
        pair = (len(z), 2)
        return best, images.unflatten(0, pair), probabilities.unflatten(0, pair)

    def _excess(self, squared: Tensor, size: int) -> Tensor:
        """By how much squared distances (N,) exceed what is allowed; a square root is differentiable at 0 here."""
        if self.distance == "mean-square":
            return (squared - self.eta**2) / size
        return (squared + 1e-12).sqrt() - self.eta

    def _check_params(self) -> None:
        scalar_clip_values(self.estimator)
        if tuple(self.estimator.input_shape) != self.generator.image_shape:
            raise ValueError(
                f"generator must make images of the classifier's shape {tuple(self.estimator.input_shape)}, "
                f"got {self.generator.image_shape}"
            )
        check_attributes(self, check_count, "max_iter", "batch_size")
        self.seed = check_count("seed", self.seed, least=0)
        check_attributes(self, check_number, "eta", "learning_rate", "multiplier", "multiplier_rate", "prior")
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
