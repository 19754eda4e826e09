"""Classification through purifiers, with a chosen backward pass and replayed random numbers, for attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from art.utils import check_and_transform_label_format, get_labels_np_array
from torch import Tensor

from art_pixeldefend.attacks import losses
from art_pixeldefend.attacks.budget import scalar_clip_values
from art_pixeldefend.purifiers.base import BatchGenerator, Purifier
from art_pixeldefend.purifiers.logits import differentiable_logits
from art_pixeldefend.purifiers.purified_model import PurifiedModel

NORMS = ("Linf", "L2")

# Functions of logits (M, classes), labels (M,) and images (M, ...) in the estimator's range.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # to be made large, (M,)
Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]  # whether the attack succeeds, (M,)


def labels_of(estimator: Any, x: np.ndarray, y: np.ndarray | None, batch_size: int) -> Tensor:
    """Class numbers (N,) on the estimator's device: of ``y``, numbers or one-hot, or predicted if it is None."""
    if y is None:
        y = get_labels_np_array(estimator.predict(x, batch_size=batch_size))
    y = check_and_transform_label_format(y, nb_classes=estimator.nb_classes)
    return torch.from_numpy(y.argmax(axis=1)).to(estimator.device)


def per_image(values: Tensor, x: Tensor) -> Tensor:
    """Values (N,) in a shape that broadcasts over images ``x`` (N, ...)."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def projected(z: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    """The points of the balls around ``x``, and of [0, 1], to which ``z`` is moved."""
    if norm == "Linf":
        return z.minimum(x + eps).maximum(x - eps).clamp(0, 1)
    change = z - x
    length = per_image(change.flatten(1).norm(dim=1), x)
    return (x + change * (eps / length.clamp_min(1e-30)).clamp_max(1)).clamp(0, 1)


def purifiers_of(estimator: Any) -> list[Purifier]:
    """The purifiers of a PyTorch classifier: among its preprocessing defences, and inside its model."""
    found = [p for p in estimator.preprocessing_operations if isinstance(p, Purifier) and p.apply_predict]
    found += [module.purifier for module in estimator.model.modules() if isinstance(module, PurifiedModel)]
    return list(dict.fromkeys(found))


def is_random(estimator: Any) -> bool:
    """Whether any purifier of a PyTorch classifier draws numbers that are not the same at every call."""
    return any(p.stochastic and p.seed is None for p in purifiers_of(estimator))


@contextmanager
def backward_pass(purifiers: Sequence[Purifier], gradient: Any) -> Iterator[None]:
    """Let purifiers use a backward pass, as their argument ``gradient``, in the context; None for their own.

    Raises:
        ValueError: naming ``gradient``, if a purifier does not support it, or if it is a surrogate of one of several
            purifiers.
    """
    if gradient is None:
        yield
        return
    if callable(gradient) and len(purifiers) != 1:
        raise ValueError(f"gradient must be a name for an estimator of {len(purifiers)} purifiers, got a surrogate")
    before = [p.gradient for p in purifiers]
    try:
        for purifier in purifiers:
            purifier.set_params(gradient=gradient)
        yield
    finally:
        for purifier, gradient in zip(purifiers, before, strict=True):
            purifier.gradient = gradient


@contextmanager
def replayed(purifiers: Sequence[Purifier], seed: int, index: Sequence[int], draws: int = 1) -> Iterator[None]:
    """Fix the random numbers of purifiers for a batch that holds ``draws`` neighbouring copies of each image.

    Each copy gets numbers of its own, a function of ``seed`` and the image's place ``index`` in the whole input. A
    purifier with a seed of its own keeps it, and all copies get the numbers that it gives to the image at this place.
    """
    with ExitStack() as stack:
        for purifier in purifiers:
            if purifier.seed is None:
                positions = [i * draws + draw for i in index for draw in range(draws)]
                stack.enter_context(purifier.drawing(seed, positions))
            else:
                stack.enter_context(purifier.drawing(purifier.seed, [i for i in index for _ in range(draws)]))
        yield


@dataclass
class Evaluation:
    """Of M images, over some draws: mean logits (M, classes), losses and margins (M,), share of successes (M,).

    ``gradient`` (M, ...), of images in [0, 1], is that of the mean loss; it is empty unless asked for.
    """

    logits: Tensor
    loss: Tensor
    margin: Tensor
    rate: Tensor
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))

    def __getitem__(self, chosen: Tensor) -> Evaluation:
        gradient = self.gradient[chosen] if len(self.gradient) else self.gradient
        return Evaluation(self.logits[chosen], self.loss[chosen], self.margin[chosen], self.rate[chosen], gradient)


class Best:
    """The best of each of N images that were evaluated so far.

    Args:
        x: the images (N, ...) to begin with, in [0, 1], which count as not evaluated.

    Attributes:
        images: (N, ...).
        rate, margin: (N,), shares of successes and mean margins.
        fallen_at: (N,), the number of steps after which an image first succeeded in most draws, -1 for never.
    """

    def __init__(self, x: Tensor) -> None:
        self.images, self.rate = x.clone(), torch.zeros(len(x), device=x.device)
        self.margin = torch.full_like(self.rate, -torch.inf)
        self.fallen_at = torch.full((len(x),), -1, device=x.device)

    def keep(self, points: Tensor, index: Tensor, found: Evaluation, steps: int) -> None:
        """Keep images (M, ...) at places ``index`` that succeed more often, or as often with a larger margin."""
        rate, margin = self.rate[index], self.margin[index]
        better = (found.rate > rate) | ((found.rate == rate) & (found.margin > margin))
        chosen = index[better]
        self.images[chosen], self.rate[chosen] = points[better], found.rate[better]
        self.margin[chosen] = found.margin[better]
        self.fallen_at[index[(found.rate > 0.5) & (self.fallen_at[index] < 0)]] = steps


class Evaluator:
    """Classifies images of one call of an attack, and counts.

    Args:
        estimator: a PyTorch classifier with clip values whose outputs are logits.
        y: labels (N,) of all images.
        seed: of all random numbers; None draws one.
        batch_size: most images, times draws, at a time.
        loss: a name in :mod:`art_pixeldefend.attacks.losses`, or a function.
        criterion: of success; None for misclassification.

    Attributes:
        purifiers: the estimator's.
        random: whether any of them draws numbers that are not the same at every call.
        low, high, scale: the clip values and their difference.
        queries: (N,), images, times draws, that were classified.
        gradients, zeros, nonfinite: number of gradients, and of those that were zero, or not finite somewhere.
    """

    def __init__(
        self,
        estimator: Any,
        y: Tensor,
        seed: int | None,
        batch_size: int,
        loss: str | Loss = "margin",
        criterion: Criterion | None = None,
    ) -> None:
        self.estimator, self.y, self.batch_size, self.loss, self.criterion = estimator, y, batch_size, loss, criterion
        self.seed = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
        self.low, self.high = scalar_clip_values(estimator)
        self.scale = self.high - self.low
        self.purifiers = purifiers_of(estimator)
        self.random = is_random(estimator)
        self.queries = torch.zeros_like(y)
        self.gradients = self.zeros = self.nonfinite = 0

    def __call__(
        self,
        points: Tensor,
        index: Tensor,
        draws: int,
        place: tuple[int, ...] = (),
        *,
        targets: Tensor | None = None,
        gradient: bool = False,
        noise: float = 0.0,
    ) -> Evaluation:
        """Classify images.

        Args:
            points: images (M, ...) in [0, 1], M > 0.
            index: their places (M,) in the whole input.
            draws: of each.
            place: evaluations at different places, such as (run, step), use different random numbers.
            targets: classes (M,) of a targeted loss.
            gradient: whether to compute gradients; NaN and infinity in them become zero.
            noise: radius of uniform noise that is added to the copies of each image, in the range [0, 1].
        """
        self.queries[index] += draws
        seed = int(np.random.SeedSequence([self.seed, len(place), *place]).generate_state(1, np.uint64)[0])
        parts = []
        for piece in torch.arange(len(points), device=points.device).split(max(1, self.batch_size // draws)):
            towards = None if targets is None else targets[piece]
            parts.append(self._batch(points[piece], index[piece], towards, draws, seed, gradient, noise))
        found = Evaluation(*(torch.cat(part) for part in zip(*parts, strict=True)))
        if gradient:
            flat = found.gradient.flatten(1)
            self.gradients += len(flat)
            self.zeros += int((flat == 0).all(1).sum())
            self.nonfinite += int((~flat.isfinite()).any(1).sum())
            found.gradient = found.gradient.nan_to_num(0.0, 0.0, 0.0)
        return found

    def to_unit(self, x: np.ndarray) -> Tensor:
        """Images of the estimator's range in [0, 1], float32, on its device."""
        return torch.from_numpy((x - self.low) / self.scale).to(self.y.device, torch.float32)

    def from_unit(self, unit: Tensor, given: np.ndarray) -> np.ndarray:
        """Images in the estimator's range; where ``unit`` is still ``to_unit(given)``, exactly ``given``."""
        attacked = (unit.cpu().numpy() * self.scale + self.low).astype(given.dtype)
        unchanged = (unit == self.to_unit(given)).flatten(1).all(1).cpu().numpy()
        attacked[unchanged] = given[unchanged]
        return np.clip(attacked, self.low, self.high)

    def _batch(
        self, points: Tensor, index: Tensor, targets: Tensor | None, draws: int, seed: int, gradient: bool, noise: float
    ) -> tuple[Tensor, ...]:
        """The parts of an :class:`Evaluation` of one batch."""

        def mean(values: Tensor) -> Tensor:
            return values.unflatten(0, (len(points), draws)).mean(1)

        y = self.y[index].repeat_interleave(draws)
        with torch.set_grad_enabled(gradient), replayed(self.purifiers, seed, index.tolist(), draws):
            points = points.detach().requires_grad_(gradient)
            copies = points.repeat_interleave(draws, 0)
            if noise:
                positions = [draws * i + draw for i in index.tolist() for draw in range(draws)]
                random = BatchGenerator(seed, positions, points.device, points.dtype).uniform(points.shape[1:])
                copies = copies + ((copies + noise * (2 * random - 1)).clamp(0, 1) - copies).detach()
            images = copies * self.scale + self.low
            logits = differentiable_logits(self.estimator, images)
            if callable(self.loss):
                loss = self.loss(logits, y, images)
            else:
                towards = None if targets is None else targets.repeat_interleave(draws)
                loss = losses.FUNCTIONS[self.loss](logits, y, towards)
            gradients = torch.autograd.grad(mean(loss).sum(), points) if gradient else ()
        with torch.no_grad():
            wrong = logits.argmax(1) != y if self.criterion is None else self.criterion(logits, y, images)
            success = wrong & logits.isfinite().all(1)
            margin = loss if callable(self.loss) else losses.margin(logits, y)
            return mean(logits).detach(), mean(loss).detach(), mean(margin).detach(), mean(success.float()), *gradients
