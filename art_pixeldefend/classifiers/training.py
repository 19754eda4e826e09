"""Training of classifiers through ART's own classes."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from art.defences.preprocessor import LabelSmoothing
from art.defences.trainer import AdversarialTrainer
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from tqdm import tqdm

from art_pixeldefend.attacks.training import HalfNormalBIM, HalfNormalFGSM, TrainingAttack, TrainingPGD
from art_pixeldefend.classifiers.layers import Network
from art_pixeldefend.classifiers.networks import as_art
from art_pixeldefend.datasets import fingerprint
from art_pixeldefend.models.checkpoint import read, write
from art_pixeldefend.precision import bf16_pays
from art_pixeldefend.validation import check_choice, check_count, check_labels

RUN = "classifier-training-run"  # the kind of checkpoints
SMOOTHING = 0.1  # the probability that label smoothing takes from the true class
RATIO = 0.6 / 2.6  # the fraction of a batch that the paper's adversarial training attacks
ADVERSARIAL: dict[str, tuple[type[TrainingAttack], float]] = {  # the attack, and the fraction of a batch it gets
    "adversarial-fgsm": (HalfNormalFGSM, RATIO),
    "adversarial-bim": (HalfNormalBIM, RATIO),
    "adversarial-pgd": (TrainingPGD, 0.75),
}
TECHNIQUES = ("normal", "label-smoothing", *ADVERSARIAL)


@dataclass(frozen=True)
class Recipe:
    """The optimiser's settings and the number of steps.

    Args:
        steps: optimiser steps.
        batch_size: images per step.
        learning_rate: its maximum.
        milestones: steps at which the learning rate is divided by ten; without any, it follows one cycle (Smith and
            Topin 2018, arXiv:1708.07120).
        momentum, nesterov, weight_decay: arguments of SGD.
        flips: mirror half of the images, left to right.
        crops: pixels of zeros to pad on every side before cropping to the image's size at random; 0 for no crops.
        mixed_precision: train under bf16 autocast if the hardware multiplies bf16; without that, autocast would take
            six times as long.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 0.1
    milestones: tuple[int, ...] = ()
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    flips: bool = True
    mixed_precision: bool = True
    crops: int = 0

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Stochastic gradient descent at the highest learning rate."""
        return torch.optim.SGD(
            parameters, self.learning_rate, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning-rate scheduler, to be stepped once after every optimiser step."""
        if self.milestones:
            return torch.optim.lr_scheduler.MultiStepLR(optimizer, self.milestones)
        total = self.steps + 1  # the scheduler counts its initial state, too
        rise = max(0.2, 2 / total)  # at least one step, or the scheduler divides by zero
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=total, pct_start=rise, cycle_momentum=False
        )


RECIPES = {
    # From the reference code; the paper does not give a recipe.
    "paper": Recipe(80_000, milestones=(40_000, 60_000), nesterov=False, mixed_precision=False),
    "quick": Recipe(3_000, learning_rate=0.2, weight_decay=1e-4),
    "cifar-10": Recipe(9_000, learning_rate=0.2, crops=4),
    # For the few small images of digits, which must not be mirrored.
    "digits": Recipe(400, batch_size=64, flips=False, mixed_precision=False),
}


def train(
    model: Network,
    x: np.ndarray,
    y: np.ndarray,
    recipe: Recipe | str = "quick",
    technique: str = "normal",
    *,
    delta: float = 8,
    smoothing: float = SMOOTHING,
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
    every: int = 500,
    verbose: bool = False,
) -> Network:
    """Train a network in place. The same seed and number of threads give the same weights.

    Args:
        model: a network that :func:`build` made.
        x: levels (N, C, H, W), uint8.
        y: labels, as class numbers (N,) or one-hot (N, classes).
        recipe: a :class:`Recipe`, or the name of one in ``RECIPES``.
        technique: ``"normal"``; ``"label-smoothing"``, by ART's ``LabelSmoothing``; or adversarial training by ART's
            ``AdversarialTrainer``, with the model's own predictions as labels. ``"adversarial-pgd"`` attacks three
            quarters of every batch with a radius of delta (Madry et al. 2018, arXiv:1706.06083).
            ``"adversarial-fgsm"`` and ``"adversarial-bim"`` attack each image with a radius of |N(0, delta)|
            (PixelDefend, Appendix B). The reference code attacks half of every batch and weights clean and attacked
            losses 2 to 0.6. ART's trainer has no weights, so the fraction :data:`RATIO` of every batch is attacked: the
            same expected gradient with less than half the attacks.
        delta: size of the radius, in levels (the paper: 8 for CIFAR-10, 8 or 25 for Fashion-MNIST).
        smoothing: the true class has probability 1 - smoothing, each other class smoothing / (classes - 1).
        seed: of the order, flips, crops, dropout and attacks.
        checkpoint: a file to store the run in every ``every`` steps. If it is there, training continues from it, on a
            CPU to the same weights as without an interruption; it must be of the same network and arguments. It is
            removed at the end.
        every: steps between checkpoints.
        verbose: show a progress bar.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: naming ``recipe``, ``technique``, ``x``, ``y``, ``every`` or ``checkpoint``, if it is not as
            described.
        FloatingPointError: if training diverged.

    Example:
        >>> from art_pixeldefend import datasets
        >>> from art_pixeldefend.classifiers.networks import accuracy, build
        >>> data = datasets.load("digits")
        >>> network = build("resnet", data.image_shape, units=1)
        >>> network = train(network, data.x_train, data.y_train, shortened("digits", steps=60))
        >>> accuracy(as_art(network), data.x_test.astype(np.float32) / 255, data.y_test) > 0.95
        True
    """
    recipe = _recipe(recipe)
    check_choice("technique", technique, TECHNIQUES)
    every = check_count("every", every)
    labels = _one_hot(x, y, model)
    if technique == "label-smoothing":
        labels = LabelSmoothing(max_value=1 - smoothing)(x, labels)[1]
    with seeded(seed):
        classifier, scheduler = _classifier(model, recipe)
        attack, fit = None, classifier.fit
        if technique in ADVERSARIAL:
            attack_class, ratio = ADVERSARIAL[technique]
            attack = attack_class(classifier, delta=delta, seed=seed)
            fit = AdversarialTrainer(classifier, attack, ratio=ratio).fit
        run = _Run(model, classifier.optimizer, scheduler, attack)
        arguments = {"recipe": asdict(recipe), "technique": technique, "delta": delta, "seed": seed}
        arguments |= {"smoothing": smoothing, "x": fingerprint(x), "y": fingerprint(labels)}
        arguments |= {"network": model.network, "configuration": model.configuration}
        if checkpoint is not None and Path(checkpoint).exists():
            run.load(checkpoint, arguments)
        # Created before standard error is redirected, which hides the progress bar that ART shows for every batch.
        bar = tqdm(
            total=recipe.steps, initial=run.step, unit="step", desc=f"train {technique}", disable=not verbose,
            file=sys.stderr,
        )  # fmt: skip
        with bar, contextlib.redirect_stderr(io.StringIO()):
            for batch in islice(batches(len(x), recipe, seed), run.step, None):
                images = crop(flip(x[batch.ids], batch.flips), batch.corners, recipe.crops).astype(np.float32) / 255
                fit(images, labels[batch.ids], batch_size=len(images), nb_epochs=1, scheduler=scheduler)
                run.step += 1
                if checkpoint is not None and run.step % every == 0:
                    run.save(checkpoint, arguments)
                bar.update()
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
        raise FloatingPointError("training diverged; lower the recipe's learning_rate")
    return model.eval()


def _one_hot(x: np.ndarray, y: np.ndarray, model: Network) -> np.ndarray:
    """Check images and labels, and return the labels one-hot, (N, classes)."""
    shape, classes = tuple(model.configuration["image_shape"]), model.configuration["classes"]
    if x.dtype != np.uint8 or x.shape[1:] != shape or not len(x):
        expected = ", ".join(map(str, shape))
        raise ValueError(f"x must be levels (N, {expected}), uint8, N > 0, got {x.dtype} of shape {x.shape}")
    labels = check_labels("y", y, len(x))
    if labels.max() >= classes:
        raise ValueError(f"y must be class numbers below {classes}, got {labels.max()}")
    return np.eye(classes, dtype=np.float32)[labels]


def _recipe(recipe: Recipe | str) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return RECIPES[check_choice("recipe", recipe, RECIPES)]


def _classifier(model: Network, recipe: Recipe) -> tuple[PyTorchClassifier, Any]:
    """The ART classifier to train, and its learning-rate scheduler."""
    optimizer = recipe.optimizer(model.parameters())
    wrapped = _MixedPrecision(model) if recipe.mixed_precision else model
    return as_art(wrapped, optimizer=optimizer), recipe.scheduler(optimizer)


class _Run:
    """What changes from step to step: weights, optimiser, scheduler, and the generators of random numbers."""

    def __init__(
        self,
        model: Network,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        attack: TrainingAttack | None,
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.attack, self.step = model, optimizer, scheduler, attack, 0

    def save(self, path: str | PathLike[str], arguments: Mapping[str, Any]) -> None:
        """Write a checkpoint."""
        state = self.optimizer.state_dict()["state"]
        momentum = {f"momentum.{i}": values["momentum_buffer"] for i, values in state.items()}
        _, key, *numpy = np.random.get_state()
        header = {"kind": RUN, "step": self.step, "arguments": arguments, "numpy": numpy}
        if self.attack is not None:
            header["attack"] = self.attack.rng.bit_generator.state
        weights = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        generators = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(key, np.int64))}
        write(path, weights | momentum | generators, header)

    def load(self, path: str | PathLike[str], arguments: Mapping[str, Any]) -> None:
        """Read a checkpoint. A file that is not one, or one of other arguments, raises ValueError."""
        tensors, header = read(path)
        if header.get("kind") != RUN or header["arguments"] != json.loads(json.dumps(arguments)):
            raise ValueError(f"checkpoint {str(path)!r} is not of a training run of this network with these arguments")
        prefix = "model."
        self.model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        optimizer = self.optimizer.state_dict()
        count = sum(name.startswith("momentum.") for name in tensors)
        optimizer["state"] = {i: {"momentum_buffer": tensors[f"momentum.{i}"]} for i in range(count)}
        self.optimizer.load_state_dict(optimizer)
        self.step = header["step"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimiser's steps were taken before the checkpoint
            for _ in range(self.step):
                self.scheduler.step()
        torch.set_rng_state(tensors["torch"])
        np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *header["numpy"]))
        if self.attack is not None:
            self.attack.rng.bit_generator.state = header["attack"]


class _MixedPrecision(Network):
    """Apply bf16 autocast in training mode only: attacks on the network are faster in float32. Logits are float32."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model, self.configuration = model, model.configuration

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.training and bf16_pays(x.device)):
            return self.model(x).float()


@dataclass(frozen=True)
class _Batch:
    ids: np.ndarray
    flips: np.ndarray
    corners: np.ndarray  # (N, 2), of the crop in the padded image


def batches(count: int, recipe: Recipe, seed: int) -> Iterator[_Batch]:
    """For each step, its images, which of them to mirror, and where to crop. Every epoch is shuffled anew."""
    rng = np.random.default_rng(seed)
    size = min(recipe.batch_size, count)
    per_epoch = count // size
    for step in range(recipe.steps):
        if step % per_epoch == 0:
            order = rng.permutation(count)
        ids = order[step % per_epoch * size :][:size]
        flips = rng.random(size) < (0.5 if recipe.flips else 0.0)
        corners = rng.integers(0, 2 * recipe.crops, (size, 2), endpoint=True) if recipe.crops else np.zeros((size, 2))
        yield _Batch(ids, flips, corners)


def flip(x: np.ndarray, which: np.ndarray, axis: int = -1) -> np.ndarray:
    """Images (N, ...), those of the mask ``which`` (N,) mirrored along ``axis``."""
    return np.where(which[:, None, None, None], np.flip(x, axis), x)


def crop(x: np.ndarray, corners: np.ndarray, padding: int) -> np.ndarray:
    """Images (N, C, H, W), padded with zeros on every side and cropped to (H, W) at ``corners`` (N, 2)."""
    if not padding:
        return x
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    return np.stack([image[:, i : i + height, j : j + width] for image, (i, j) in zip(padded, corners, strict=True)])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch and NumPy, which ART draws from, and restore them afterwards."""
    state = np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(state)


def shortened(recipe: Recipe | str, steps: int) -> Recipe:
    """A copy of a recipe with another number of steps; its milestones are moved in proportion."""
    recipe = _recipe(recipe)
    milestones = tuple(math.ceil(milestone * steps / recipe.steps) for milestone in recipe.milestones)
    return replace(recipe, steps=steps, milestones=milestones)
