"""Projected gradient descent against classifiers behind purifiers."""

from __future__ import annotations

import math
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
from art_pixeldefend.attacks.through import (
    NORMS,
    Best,
    Criterion,
    Evaluation,
    Evaluator,
    Loss,
    backward_pass,
    labels_of,
    per_image,
    projected,
)
from art_pixeldefend.attacks.training import frozen
from art_pixeldefend.levels import TOP, from_levels, to_levels
from art_pixeldefend.purifiers.base import GRADIENTS
from art_pixeldefend.validation import check_attributes, check_bool, check_choice, check_count, check_number, check_seed

SCHEDULES = ("apgd", "cosine", "constant")
DIRECTIONS = ("sign", "gradient")
FIRST_STEP = {"apgd": 2.0, "cosine": 0.5, "constant": 0.25}  # in radii
SELECTION_DRAWS = 10

# APGD (Croce and Hein 2020, arXiv:2003.01690, section 3)
INERTIA = 0.25  # share of the last change in the next one
FIRST_CHECK, SHORTER, SHORTEST = 0.22, 0.03, 0.06  # intervals between checks of the step size, in shares of all steps
RISES = 0.75  # share of steps that must raise the loss


class AdaptivePGD(EvasionAttack):
    """Attack a classifier behind purifiers by projected gradient ascent on its loss, with gradients through them.

    It differs from ART's PGD and AutoPGD in what a defence that purifies calls for:

    - It returns the best of all images on the way, not the last: through a discontinuous purifier the loss jumps.
      Where the defence draws random numbers, an image is chosen by draws other than those that made its gradients.
    - Gradients are averaged over ``eot`` draws, all in one batch (expectation over transformation, EOT: Athalye et al.
      2018, arXiv:1707.07397).
    - ``gradient`` chooses the purifiers' backward pass, among them that of a learned
      :class:`~art_pixeldefend.attacks.Surrogate`.
    - Images that all selection draws misclassify, from the start or on the way, are not attacked further.

    All random numbers of an image, also the purifiers', are a function of ``seed`` and the image's place in ``x``:
    results do not depend on ``batch_size``, up to rounding. A purifier with an integer seed draws what it draws for
    this place in prediction, so that the attack knows its random numbers.

    Args:
        estimator: a PyTorch classifier with clip values whose outputs are logits. Purifiers are found among its
            preprocessing defences and, as :class:`~art_pixeldefend.PurifiedModel`, inside its model.
        norm: ``"Linf"`` or ``"L2"``.
        eps: radius, in the units of the estimator's clip values.
        steps: gradient steps of one run. There is one run for each restart, or for each restart and target.
        step_size: of the first step, as ``eps``. By default 2 ``eps`` for ``"apgd"``, ``eps`` / 2 for ``"cosine"``,
            ``eps`` / 4 for ``"constant"``.
        schedule: of the step sizes. ``"apgd"`` halves an image's when its loss stops rising, and goes back to its best
            image (Auto-PGD: Croce and Hein 2020, arXiv:2003.01690); ``"cosine"`` lets them fall to 0; ``"constant"``.
        along: direction of a step within an L-infinity ball: ``"sign"`` of the gradient, or ``"gradient"``, of which
            the largest value is then the step size. Signs change all pixels alike, which likelihood detectors notice.
        momentum: decay of the sum of gradients that gives the direction, each divided by its L1 norm, for ``"cosine"``
            and ``"constant"``; 0 for none. Auto-PGD has its own momentum.
        loss: ``"ce"``, ``"margin"``, ``"dlr"`` (see :mod:`art_pixeldefend.attacks.losses`), or a function of (logits,
            labels, images), images being those of the logits in the units of ``eps``, that returns one number for each
            row; the attack makes it large.
        targets: 0 attacks towards any other class; k runs towards each of the k most likely other classes in turn.
        restarts: runs from different random starts.
        eot: draws whose gradients are averaged. 1 is enough if nothing is random.
        noise: radius of uniform noise, as ``eps``, that is added to the copies of an image whose gradients are
            averaged. It smooths the loss of a discontinuous purifier; images are judged without it.
        gradient: the purifiers' backward pass: ``"identity"``, ``"exact"``, ``"implicit"``, a surrogate; None keeps
            their own.
        selection_draws: draws that choose the best image; None for 10 if a purifier draws random numbers, or ``eot``
            is more than 1 without ``noise``, and otherwise for one forward pass: without noise that of the gradient.
        success_criterion: a function of (logits, labels, images), as ``loss``, that returns whether the attack is to be
            counted as successful, (M,), bool. By default: whether the image is misclassified.
        round_to_levels: whether to attack with 8-bit images only, within ``eps`` of ``x`` rounded to 8 bits.
        seed: of the random numbers; None for a new one at every call.
        batch_size: most images, times draws, that the classifier gets at a time.
        verbose: show a progress bar.

    Attributes:
        success: (N,), whether more than half of the selection draws misclassify an image that :meth:`generate`
            returned.
        success_rate: (N,), the share of selection draws that misclassify it.
        queries: (N,), the images, times draws, that were classified for each image.
        fallen_at: (N,), the number of steps, of all runs together, after which an image was first misclassified in
            most draws: 0 for the clean image; -1 for never.
        losses: (runs, steps + 1, N), the mean of an image's loss over the draws of each step; NaN after
            all selection draws misclassified it.
        zero_gradients: the share of an image's gradients in which every value was zero, over all images and steps.
        nonfinite_gradients: the share of gradients with NaN or infinity, which are replaced by zero.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from torch import nn
        >>> from art_pixeldefend import PixelDefend, datasets
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> purifier = PixelDefend(eps=16, pixel_cnn="digits")
        >>> classifier = PyTorchClassifier(
        ...     model, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1), preprocessing_defences=[purifier]
        ... )
        >>> x = datasets.load("digits").x_test[:4].astype(np.float32) / 255
        >>> attack = AdaptivePGD(classifier, eps=8 / 255, steps=3, seed=0)
        >>> attacked = attack.generate(x)
        >>> bool(abs(attacked - x).max() < 8.001 / 255), attack.success.shape
        (True, (4,))
    """

    attack_params = [
        *EvasionAttack.attack_params, "norm", "eps", "steps", "step_size", "schedule", "along",
        "momentum", "loss", "targets", "restarts", "eot", "noise", "gradient", "selection_draws", "success_criterion",
        "round_to_levels", "seed", "batch_size", "verbose",
    ]  # fmt: skip
    _estimator_requirements = (PyTorchClassifier,)

    def __init__(
        self,
        estimator: Any,
        *,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 50,
        step_size: float | None = None,
        schedule: str = "apgd",
        along: str = "sign",
        momentum: float = 0.75,
        loss: str | Loss = "ce",
        targets: int = 0,
        restarts: int = 1,
        eot: int = 1,
        noise: float = 0.0,
        gradient: Any = None,
        selection_draws: int | None = None,
        success_criterion: Criterion | None = None,
        round_to_levels: bool = False,
        seed: int | None = None,
        batch_size: int = 128,
        verbose: bool = False,
    ) -> None:
        super().__init__(estimator=estimator)
        self.norm, self.eps, self.steps, self.step_size, self.schedule = norm, eps, steps, step_size, schedule
        self.along = along
        self.momentum, self.loss, self.targets, self.restarts, self.eot = momentum, loss, targets, restarts, eot
        self.noise = noise
        self.gradient, self.selection_draws, self.success_criterion = gradient, selection_draws, success_criterion
        self.round_to_levels, self.seed, self.batch_size, self.verbose = round_to_levels, seed, batch_size, verbose
        self._check_params()

    def generate(
        self,
        x: np.ndarray,
        y: np.ndarray | None = None,
        *,
        start: np.ndarray | None = None,
        only: np.ndarray | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Attack images; of an image that is never misclassified the one with the largest margin is returned.

        Args:
            x: images (N, ...) within the clip values.
            y: labels to get away from, class numbers (N,) or one-hot; by default the classifier's own predictions.
            start: images (N, ...) from which the first restart begins, such as those that fool the classifier without
                its purifiers, moved into the balls; by default random ones, as in all other restarts.
            only: which images to attack, (N,), bool; the others are returned as they are, without success. Images keep
                their places, on which random numbers depend. By default all.

        Raises:
            ValueError: naming ``start`` or ``only``, if it is not of the shape described.
        """
        x = x.astype(ART_NUMPY_DTYPE)
        if start is not None and np.shape(start) != x.shape:
            raise ValueError(f"start must have the shape of x, {x.shape}, got {np.shape(start)}")
        only = np.ones(len(x), bool) if only is None else np.asarray(only)
        if only.shape != (len(x),) or only.dtype != bool:
            raise ValueError(f"only must be {len(x)} bools, got shape {only.shape} of {only.dtype}")
        search = _Search(self, x, labels_of(self.estimator, x, y, self.batch_size), start)
        evaluator = search.evaluator
        with frozen(self.estimator), backward_pass(evaluator.purifiers, self.gradient):
            attacked = search.run(only)
        self.success_rate = search.best.rate.cpu().numpy()
        self.success = self.success_rate > 0.5
        self.fallen_at, self.losses = search.best.fallen_at.cpu().numpy(), search.losses.cpu().numpy()
        self.queries = evaluator.queries.cpu().numpy()
        count = max(evaluator.gradients, 1)
        self.zero_gradients, self.nonfinite_gradients = evaluator.zeros / count, evaluator.nonfinite / count
        return attacked

    def _check_params(self) -> None:
        scalar_clip_values(self.estimator)
        for name, choices in (("norm", NORMS), ("schedule", SCHEDULES), ("along", DIRECTIONS)):
            check_choice(name, getattr(self, name), choices)
        check_attributes(self, check_count, "steps", "restarts", "eot", "batch_size")
        check_attributes(self, check_number, "eps", "noise", "momentum")
        if self.selection_draws is not None:
            self.selection_draws = check_count("selection_draws", self.selection_draws)
        self.seed = check_seed("seed", self.seed)
        if self.step_size is not None:
            self.step_size = check_number("step_size", self.step_size)
        if not (callable(self.loss) or self.loss in losses.NAMES):
            raise ValueError(f"loss must be a function or one of {', '.join(losses.NAMES)}, got {self.loss!r}")
        others = self.estimator.nb_classes - 1
        self.targets = check_count("targets", self.targets, least=0, most=others)
        if self.targets and callable(self.loss):
            raise ValueError("targets must be 0 for a loss that is a function")
        least = 3 if self.targets else 2
        if self.loss == "dlr" and others < least:
            raise ValueError(f"loss must not be 'dlr' for fewer than {least + 1} classes")
        if not (self.gradient is None or callable(self.gradient) or self.gradient in GRADIENTS):
            raise ValueError(f"gradient must be None, a function or one of {', '.join(GRADIENTS)}")
        check_attributes(self, check_bool, "round_to_levels", "verbose")


class _Search:
    """One call of ``generate``: images in [0, 1], the best of them so far, and what was counted on the way."""

    def __init__(self, attack: AdaptivePGD, x: np.ndarray, y: Tensor, start: np.ndarray | None) -> None:
        self.attack, self.y, self.given = attack, y, x
        self.evaluator = Evaluator(
            attack.estimator, y, attack.seed, attack.batch_size, attack.loss, attack.success_criterion
        )
        self.clip_values = self.evaluator.low, self.evaluator.high
        self.x = self._to_unit(x)
        self.start = None if start is None else self._to_unit(np.asarray(start, np.float32))
        self.best = Best(self.x)
        self.selection_draws = attack.selection_draws
        if self.selection_draws is None and (self.evaluator.random or (attack.eot > 1 and not attack.noise)):
            self.selection_draws = SELECTION_DRAWS
        elif self.selection_draws is None and attack.noise:
            self.selection_draws = 1
        count, device = len(x), y.device
        self.promise = torch.full((count,), -torch.inf, device=device)  # largest margin over a gradient's draws
        runs = attack.restarts * max(attack.targets, 1)
        self.losses = torch.full((runs, attack.steps + 1, count), torch.nan, device=device)

    def run(self, only: np.ndarray) -> np.ndarray:
        """Attack the images ``only``, (N,), and return the best of all, in the estimator's range."""
        attack, chosen = self.attack, torch.from_numpy(np.flatnonzero(only)).to(self.x.device)
        if not len(chosen):
            return self._from_unit(self.best.images)
        clean = self.evaluator(self.x[chosen], chosen, self.selection_draws or 1)
        self.best.keep(self.x[chosen], chosen, clean, 0)
        targets = torch.zeros((len(self.x), max(attack.targets, 1)), dtype=torch.long, device=self.x.device)
        targets[chosen] = clean.logits.scatter(1, self.y[chosen, None], -torch.inf).topk(targets.shape[1]).indices
        with tqdm(total=len(self.losses) * attack.steps, unit="step", desc="attack", disable=not attack.verbose) as bar:
            for run in range(len(self.losses)):
                index = chosen[self.best.rate[chosen] < 1]
                towards = targets[:, run % attack.targets] if attack.targets else None
                self._climb(run, index, towards, bar)
        return self._from_unit(self.best.images)

    def _climb(self, run: int, index: Tensor, targets: Tensor | None, bar: tqdm) -> None:
        """Ascend from a random start, with the images ``index``; those that fall leave."""
        attack = self.attack
        ascent = _Ascent(attack, self.x[index], self._start(index, run), self.eps)
        active = torch.arange(len(index), device=index.device)
        for step in range(attack.steps + 1):
            if not len(active):
                break
            where, last = index[active], step == attack.steps
            points = self._rounded(ascent.z[active], self.x[where])
            towards = None if targets is None else targets[where]
            noise = 0.0 if last else attack.noise / self.evaluator.scale
            found = self.evaluator(
                points, where, attack.eot, (run, step), targets=towards, gradient=not last, noise=noise
            )
            self.losses[run, step, where] = found.loss
            self._select(points, where, found, run * attack.steps + step, last)
            bar.update(not last)
            if not last:
                going = self.best.rate[where] < 1
                active = active[going]
                ascent.move(active, found[going], step)

    def _select(self, points: Tensor, index: Tensor, found: Evaluation, steps: int, last: bool) -> None:
        """Keep images that are better than the best so far.

        Where there are selection draws, they judge images of the largest margin so far, and the ``last`` of every run:
        one lucky draw of the gradient's must not keep all later images from being judged.
        """
        if self.selection_draws is not None:
            chosen = (found.margin > self.promise[index]) | (self.attack.noise > 0) | last
            points, index = points[chosen], index[chosen]
            self.promise[index] = self.promise[index].maximum(found.margin[chosen])
            if not len(index):
                return
            found = self.evaluator(points, index, self.selection_draws)
        self.best.keep(points, index, found, steps)

    def _start(self, index: Tensor, run: int) -> Tensor:
        """The points of the ball, (M, ...), at which a run begins."""
        x = self.x[index]
        if self.start is not None and run < max(self.attack.targets, 1):
            return projected(self.start[index], x, self.eps, self.attack.norm)
        noise = np.empty(x.shape, np.float32)
        for row, place in zip(noise, index.tolist(), strict=True):
            rng = np.random.default_rng([self.evaluator.seed, place, run])
            row[:] = rng.uniform(-1, 1, row.shape) if self.attack.norm == "Linf" else rng.standard_normal(row.shape)
        direction = torch.from_numpy(noise).to(x)
        if self.attack.norm == "L2":
            direction = _unit(direction, "L2")
        return projected(x + self.eps * direction, x, self.eps, self.attack.norm)

    @property
    def eps(self) -> float:
        """The radius in the range [0, 1]."""
        return self.attack.eps / self.evaluator.scale

    def _rounded(self, z: Tensor, x: Tensor) -> Tensor:
        """Images in the ball of ``x`` close to ``z``, 8-bit ones if wanted."""
        if not self.attack.round_to_levels:
            return z
        levels, centre = z.double() * TOP, to_levels(x).double()
        nearest = levels.round()
        if self.attack.norm == "Linf":
            radius = math.floor(self.eps * TOP + 1e-3)
            nearest = nearest.minimum(centre + radius).maximum(centre - radius)
        else:
            inside = centre + (levels - centre).trunc()  # closer to the centre in every value
            far = (nearest - centre).flatten(1).norm(dim=1) > self.eps * TOP
            nearest = torch.where(per_image(far, x), inside, nearest)
        return (nearest.clamp(0, TOP) / TOP).to(z.dtype)

    def _to_unit(self, x: np.ndarray) -> Tensor:
        """Images of the estimator's range in [0, 1], rounded to 8 bits if wanted."""
        if self.attack.round_to_levels:
            return from_levels(torch.from_numpy(to_levels(x, self.clip_values)).to(self.y.device))
        return self.evaluator.to_unit(x)

    def _from_unit(self, unit: Tensor) -> np.ndarray:
        """Images in the estimator's range; those that were not changed are exactly the input, unless rounded."""
        if self.attack.round_to_levels:
            return from_levels(to_levels(unit).cpu().numpy(), self.clip_values, self.given.dtype)
        return self.evaluator.from_unit(unit, self.given)


class _Ascent:
    """The iterates of one run: points ``z`` (M, ...) of the balls around ``x``, moved along gradients."""

    def __init__(self, attack: AdaptivePGD, x: Tensor, z: Tensor, eps: float) -> None:
        self.attack, self.x, self.z, self.eps = attack, x, z, eps
        self.before = z.clone()
        first = FIRST_STEP[attack.schedule] * eps
        if attack.step_size is not None and attack.eps:
            first = attack.step_size / attack.eps * eps
        self.first = first
        self.size = torch.full((len(x),), first, device=x.device)
        self.velocity = torch.zeros_like(z)
        # of Auto-PGD
        self.best, self.gradient = z.clone(), torch.zeros_like(z)
        self.highest = torch.full((len(x),), -torch.inf, device=x.device)
        self.last, self.highest_at_check = self.highest.clone(), self.highest.clone()
        self.rises = torch.zeros(len(x), device=x.device)
        self.halved = torch.ones(len(x), dtype=torch.bool, device=x.device)
        self.interval = max(1, int(FIRST_CHECK * attack.steps))
        self.checked = 0

    def move(self, active: Tensor, found: Evaluation, step: int) -> None:
        """Move the images ``active`` (K,) from points whose losses and gradients are given."""
        if self.attack.schedule == "apgd":
            self._move_apgd(active, found.loss, found.gradient, step)
            return
        size = self.first
        if self.attack.schedule == "cosine":
            size *= (1 + math.cos(math.pi * step / self.attack.steps)) / 2
        length = per_image(found.gradient.flatten(1).abs().sum(1), self.x).clamp_min(1e-30)
        self.velocity[active] = self.attack.momentum * self.velocity[active] + found.gradient / length
        self.z[active] = self._step(active, self.velocity[active], torch.full_like(found.loss, size))

    def _step(self, active: Tensor, direction: Tensor, size: Tensor) -> Tensor:
        x = self.x[active]
        if self.attack.norm == "Linf" and self.attack.along == "gradient":
            direction = direction / per_image(direction.flatten(1).abs().amax(1), x).clamp_min(1e-30)
        else:
            direction = _unit(direction, self.attack.norm)
        moved = self.z[active] + per_image(size, x) * direction
        return projected(moved, x, self.eps, self.attack.norm)

    def _move_apgd(self, active: Tensor, loss: Tensor, gradient: Tensor, step: int) -> None:
        self.rises[active] += (loss > self.last[active]).float()
        self.last[active] = loss
        higher = loss > self.highest[active]
        chosen = active[higher]
        self.highest[chosen], self.best[chosen], self.gradient[chosen] = loss[higher], self.z[chosen], gradient[higher]
        if step - self.checked >= self.interval:
            self._check(active, gradient)
            self.checked = step
            shorter = self.interval - max(1, int(SHORTER * self.attack.steps))
            self.interval = max(1, int(SHORTEST * self.attack.steps), shorter)
        now, before = self.z[active], self.before[active]
        moved = self._step(active, gradient, self.size[active])
        if step:
            moved = now + (1 - INERTIA) * (moved - now) + INERTIA * (now - before)
            moved = projected(moved, self.x[active], self.eps, self.attack.norm)
        self.before[active], self.z[active] = now, moved

    def _check(self, active: Tensor, gradient: Tensor) -> None:
        """Halve the step size of images whose loss rises too seldom, and go back to their best points."""
        stalled = ~self.halved[active] & (self.highest[active] <= self.highest_at_check[active])
        seldom = self.rises[active] <= RISES * self.interval
        back = seldom | stalled
        index = active[back]
        self.halved[active], self.highest_at_check[active] = back, self.highest[active]
        self.rises[active] = 0
        self.size[index] /= 2
        self.z[index] = self.before[index] = self.best[index]
        gradient[back] = self.gradient[index]


def _unit(direction: Tensor, norm: str) -> Tensor:
    """The step of size 1 in this norm along which a function of this gradient rises most; 0 for a gradient of 0."""
    if norm == "Linf":
        return direction.sign()
    scale = per_image(direction.flatten(1).abs().amax(1), direction).clamp_min(1e-30)
    direction = direction / scale  # squares of tiny gradients would underflow
    return direction / per_image(direction.flatten(1).norm(dim=1), direction).clamp_min(1e-30)
