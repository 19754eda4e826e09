"""The attacks of a robustness evaluation, in the order in which they run, for each budget."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from art.defences.preprocessor import Preprocessor
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_pixeldefend.attacks import (
    AdaptivePGD,
    DetectorAware,
    LatentAttack,
    Square,
    auto_attack,
    fit_surrogate,
    make_attack,
)
from art_pixeldefend.attacks.budget import scalar_clip_values
from art_pixeldefend.attacks.detector_aware import SELECTIVE
from art_pixeldefend.attacks.through import purifiers_of
from art_pixeldefend.classifiers.training import seeded
from art_pixeldefend.evaluation.preprocessors import Sequential
from art_pixeldefend.evaluation.threat import Threat
from art_pixeldefend.levels import LEVELS, from_levels, to_levels
from art_pixeldefend.purifiers import AdaptivePixelDefend, ManifoldProjection, PurifiedModel, Purifier
from art_pixeldefend.validation import check_choice

BUDGETS = ("quick", "standard", "full")
AGAIN = "again"  # the attack that repeats the strongest one with twice the effort


@dataclass(frozen=True)
class Ball:
    """The images that an attack may return: within ``eps`` of the input in a norm, ``"Linf"`` or ``"L2"``."""

    eps: float
    norm: str = "Linf"

    def distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Distances (N,) of images (N, ...)."""
        change = (a - b).reshape(len(a), -1)
        return np.abs(change).max(1, initial=0) if self.norm == "Linf" else np.linalg.norm(change, axis=1)

    @property
    def text(self) -> str:
        """As in ``8/255 (Linf)``."""
        levels = self.eps * (LEVELS - 1)
        whole = self.norm == "Linf" and abs(levels - round(levels)) < 1e-6
        return (f"{round(levels)}/255" if whole else f"{self.eps:g}") + f" ({self.norm})"


class Subject:
    """A classifier behind a defence: what is attacked and what is measured.

    Args:
        model: a module from images in [0, 1], (N, C, H, W), to logits; or an ART classifier with clip values, whose
            own preprocessing defences, if it has any, come before ``purifier``.
        purifier: any ART preprocessor, or None.
        x: images (N, ...) of the evaluation; their shape and number of classes are those of the classifier.
        batch_size: images, times draws, at a time.
        surrogate_images: on which surrogates of the purifier are trained; without them there is no such attack.

    Attributes:
        bare: the classifier without any defence, as an ART classifier.
        defended: the classifier behind everything.
        clip_values: of the images.
        defences: all preprocessors.
        purifiers: all :class:`Purifier` in front of the classifier and inside its modules.
        outputs: logits of the first images, of one draw.
        stochastic: whether two passes over the first images, or over others close to them, differ.
        eight_bit: whether ``x`` holds 8-bit images; all attacks but AutoAttack then return such images, too.

    Raises:
        ValueError: naming ``model`` or ``purifier``, if it is not as described.
    """

    def __init__(
        self,
        model: nn.Module | PyTorchClassifier,
        purifier: Preprocessor | None,
        x: np.ndarray,
        batch_size: int = 256,
        surrogate_images: np.ndarray | None = None,
    ) -> None:
        self.surrogate_images = surrogate_images
        if not (purifier is None or isinstance(purifier, Preprocessor)):
            raise ValueError(f"purifier must be an ART preprocessor or None, got {type(purifier).__name__}")
        classifier = _as_art(model, x) if isinstance(model, nn.Module) else model
        self.defences = [*(classifier.preprocessing_defences or []), *([] if purifier is None else [purifier])]
        self.bare = _behind(classifier, [])
        self.defended = _behind(classifier, [_keeping_dtype(defence) for defence in self.defences])
        self.clip_values, self.batch_size = scalar_clip_values(classifier), batch_size
        self.purifiers: list[Purifier] = purifiers_of(self.defended)
        self.undefended = not self.defended.preprocessing_defences and not self.purifiers
        self.eight_bit = np.allclose(from_levels(to_levels(x, self.clip_values), self.clip_values), x, atol=1e-6)
        self.outputs = torch.from_numpy(self.logits(x[:8], 1))
        self.stochastic = any(p.stochastic and p.seed is None for p in self.purifiers) or self._varies_near(x[:8])

    def gradients(self) -> tuple[str, ...]:
        """The backward passes that all purifiers support."""
        sets = [set(p.gradients) for p in self.purifiers]
        return tuple(sorted(set.intersection(*sets))) if sets else ()

    def logits(self, x: np.ndarray, seed: int) -> np.ndarray:
        """Logits (N, classes) of one draw."""
        with seeded(seed):
            return self.defended.predict(x, batch_size=self.batch_size)

    def labels(self, x: np.ndarray, draws: int, seed: int) -> np.ndarray:
        """Predicted classes (N, draws); -1 where the logits are not finite."""
        columns = []
        for draw in range(draws):
            logits = self.logits(x, derived_seed(seed, "draw", draw))
            columns.append(np.where(np.isfinite(logits).all(1), logits.argmax(1), -1))
        return np.stack(columns, 1)

    def _varies_near(self, x: np.ndarray) -> bool:
        """Whether two passes over images, or over others close to them, differ."""
        low, high = self.clip_values
        noise = np.random.default_rng(0).uniform(-0.1, 0.1, x.shape) * (high - low)
        return self.varies(x) or self.varies(np.clip(x + noise, low, high).astype(x.dtype))

    def varies(self, x: np.ndarray) -> bool:
        """Whether two passes over images differ."""
        first, second = (self.logits(x, seed) for seed in (1, 2))
        return not np.allclose(first, second, rtol=1e-4, atol=1e-4)


def derived_seed(seed: int, *parts: Any) -> int:
    """A seed that is a function of ``seed`` and of names or numbers."""
    numbers = [zlib.crc32(str(part).encode()) for part in parts]
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1)[0])


def _as_art(model: nn.Module, x: np.ndarray) -> PyTorchClassifier:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    with torch.no_grad(), seeded(0):
        classes = model(torch.from_numpy(np.asarray(x[:1], np.float32)).to(device)).shape[-1]
    return PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0.0, 1.0),
        device_type="cpu" if device.type == "cpu" else "gpu",
    )  # fmt: skip


def _keeping_dtype(defence: Preprocessor) -> Preprocessor:
    """A preprocessor that returns images of the dtype it gets; some of ART's NumPy ones return float64."""
    return defence if isinstance(defence, PreprocessorPyTorch) else Sequential([defence])


def _behind(classifier: PyTorchClassifier, defences: list[Preprocessor]) -> PyTorchClassifier:
    """A copy of a classifier that shares its model, behind these defences."""
    clone = copy.copy(classifier)
    clone.preprocessing_operations = []  # ART clears and refills the list, which the copy shares
    clone.set_params(preprocessing_defences=defences or None)
    return clone


Attacked = tuple[np.ndarray, dict[str, Any]]
Run = Callable[[Subject, np.ndarray, np.ndarray, Threat, Ball, int], Attacked]


@dataclass(frozen=True)
class Planned:
    """An attack of an evaluation.

    Args:
        name: unique in its evaluation.
        threat: what it sees and does.
        run: returns attacked images, and facts to report, for (subject, x, y, threat, ball, seed). The fact ``"late"``
            is a mask (N,) of the images that were first fooled in the second half of the attack's steps.
        survivors: whether it attacks only images that no attack before it has made wrong in every draw; if it sees
            everything, that no attack that sees everything has.
        settings: what else its images follow from; JSON-serialisable.
    """

    name: str
    threat: Threat
    run: Run
    survivors: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def adaptive_pgd(subject: Subject, x: np.ndarray, y: np.ndarray, threat: Threat, ball: Ball, seed: int) -> Attacked:
    """Run AdaptivePGD on the classifier alone or through the defence, as the threat says.

    On the classifier alone it goes on with misclassified images, for the largest loss: a defence that it does not see
    takes back images that have just crossed the classifier's decision boundary.
    """
    transferred = threat.sees == "classifier"
    estimator = subject.bare if transferred else subject.defended
    gradient: Any = threat.gradient
    if gradient == "surrogate":
        if subject.surrogate_images is None:
            raise ValueError("surrogate_images must be given for attacks through a surrogate")
        gradient = fit_surrogate(subject.purifiers[0], subject.surrogate_images, seed=seed)
    attack = AdaptivePGD(
        estimator, norm=ball.norm, eps=ball.eps, steps=threat.steps or 50, loss=threat.loss or "ce",
        targets=threat.targets, restarts=threat.restarts, eot=threat.eot, gradient=gradient,
        round_to_levels=subject.eight_bit, seed=seed, batch_size=subject.batch_size,
        success_criterion=_never if transferred else None,
    )  # fmt: skip
    attacked = attack.generate(x, y)
    steps, fallen_at = attack.losses.shape[0] * attack.steps, attack.fallen_at
    if threat.targets:  # each in a run of its own
        late = (fallen_at > 0) & ((fallen_at - 1) % attack.steps >= attack.steps / 2)
    else:
        late = fallen_at > steps / 2
    facts = {
        "queries": float(attack.queries.mean()), "steps": steps, "late": late,
        "zero_gradients": float(attack.zero_gradients), "nonfinite_gradients": float(attack.nonfinite_gradients),
    }  # fmt: skip
    return attacked, facts


def _never(logits: torch.Tensor, labels: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """A success criterion that no image meets, (M,)."""
    return torch.zeros_like(labels, dtype=torch.bool)


def bim(subject: Subject, x: np.ndarray, y: np.ndarray, threat: Threat, ball: Ball, seed: int) -> Attacked:
    """Run BIM with the paper's step and number of steps, which returns its last images."""
    estimator = subject.bare if threat.sees == "classifier" else subject.defended
    low, high = subject.clip_values
    levels = round(ball.eps / (high - low) * (LEVELS - 1))
    attack = make_attack("bim", estimator, levels, batch_size=subject.batch_size, seed=seed)
    return attack.generate(x, np.eye(estimator.nb_classes, dtype=np.float32)[y]), {}


def latent(subject: Subject, x: np.ndarray, y: np.ndarray, threat: Threat, ball: Ball, seed: int) -> Attacked:
    """Run LatentAttack on a projection onto a generator's range."""
    attack = LatentAttack(
        subject.defended, norm=ball.norm, eps=ball.eps, steps=threat.steps or 200, draws=threat.eot, seed=seed,
        batch_size=subject.batch_size,
    )  # fmt: skip
    attacked = attack.generate(x, y)
    return _on_grid(subject, x, attacked), {"queries": float(attack.queries.mean())}


def unpurified(subject: Subject, x: np.ndarray, y: np.ndarray, threat: Threat, ball: Ball, seed: int) -> Attacked:
    """Run DetectorAware on Adaptive PixelDefend, for images below its threshold, which it does not purify."""
    (purifier,) = subject.purifiers
    assert isinstance(purifier, AdaptivePixelDefend)
    attack = DetectorAware(
        subject.bare, purifier, norm=ball.norm, eps=ball.eps, steps=threat.steps or 50, methods=(SELECTIVE, 1.0),
        seed=seed, batch_size=subject.batch_size,
    )  # fmt: skip
    return attack.generate(x, y), {}


def square(subject: Subject, x: np.ndarray, y: np.ndarray, threat: Threat, ball: Ball, seed: int) -> Attacked:
    """Run Square, which sees logits only; of a random defence, means over ``eot`` draws."""
    attack = Square(
        subject.defended, eps=ball.eps, steps=threat.steps or 1000, draws=threat.eot, seed=seed,
        batch_size=subject.batch_size,
    )  # fmt: skip
    attacked = attack.generate(x, y)
    return _on_grid(subject, x, attacked), {"queries": float(attack.queries.mean())}


def _on_grid(subject: Subject, x: np.ndarray, attacked: np.ndarray) -> np.ndarray:
    """The attacked images, as 8-bit images if ``x`` are: each value at the next level in the direction of ``x``."""
    if not subject.eight_bit:
        return attacked
    low, high = subject.clip_values
    change = ((attacked.astype(np.float64) - x) / (high - low) * (LEVELS - 1)).round(3)
    levels = to_levels(x, subject.clip_values) + np.trunc(change)
    return from_levels(levels.astype(np.uint8), subject.clip_values, attacked.dtype)


def public_auto_attack(
    subject: Subject, x: np.ndarray, y: np.ndarray, threat: Threat, ball: Ball, seed: int
) -> Attacked:
    """Run AutoAttack's own code on the defended module, "rand" for random defences."""
    module = subject.bare.model
    if subject.defences:
        module = PurifiedModel(module, subject.purifiers[0])
    version, iterations = "rand" if subject.stochastic else "standard", threat.steps or 100
    device = subject.defended.device
    attacked = auto_attack(
        module, torch.from_numpy(x).to(device), torch.from_numpy(y).to(device), norm=ball.norm, eps=ball.eps,
        version=version, iterations=iterations, queries=50 * iterations, draws=threat.eot,
        batch_size=subject.batch_size, seed=seed,
    )  # fmt: skip
    return attacked.cpu().numpy(), {}


def plan(subject: Subject, budget: str, ball: Ball, eot: int | None = None) -> list[Planned]:
    """The attacks of a budget on a subject.

    Args:
        subject: what is attacked.
        budget: one of :data:`BUDGETS`.
        ball: of the attacks.
        eot: draws per gradient, if not the budget's.

    Raises:
        ValueError: naming ``budget``.
    """
    check_choice("budget", budget, BUDGETS)
    level = BUDGETS.index(budget)
    if eot is None:
        eot = (4, 16, 20)[level] if subject.stochastic else 1
    steps, classes = (20, 50, 100)[level], subject.defended.nb_classes
    known = any(p.stochastic and p.seed is not None for p in subject.purifiers)
    through = Threat("everything", eot=eot, steps=steps, restarts=(1, 1, 5)[level], loss="ce", seeds_known=known)
    attacks = []
    if not subject.undefended:
        levels = ball.eps / (subject.clip_values[1] - subject.clip_values[0]) * (LEVELS - 1)
        if ball.norm == "Linf" and subject.eight_bit and math.isclose(levels, round(levels), abs_tol=1e-6):
            attacks.append(Planned("blind", Threat("classifier", loss="ce"), bim))
        transferred = Threat("classifier", steps=(10, 40, 100)[level], loss="margin")
        attacks.append(Planned("transfer", transferred, adaptive_pgd))
    gradients = subject.gradients()
    best = replace(through, gradient="identity") if gradients else through
    attacks.append(Planned("PGD" if subject.undefended else "BPDA", best, adaptive_pgd))
    for better in (g for g in ("exact", "implicit") if g in gradients):
        best = replace(through, gradient=better, steps=(10, 50, 100)[level])
        attacks.append(Planned(better, best, adaptive_pgd, survivors=level == 0))
    if [type(p) for p in subject.purifiers] == [ManifoldProjection]:
        latents = replace(through, gradient="latent", restarts=1, steps=(50, 200, 500)[level], loss=None)
        attacks.append(Planned("latent", latents, latent, survivors=True))
    alone = subject.defences in ([], subject.purifiers)  # nothing but the purifier is in front of the classifier
    if alone and [type(p) for p in subject.purifiers] == [AdaptivePixelDefend] and subject.eight_bit:
        below = Threat("everything", steps=(20, 50, 100)[level], loss="margin", detector=True)
        attacks.append(Planned("unpurified", below, unpurified, survivors=True))
    if level and len(subject.purifiers) == 1 and "exact" not in gradients and subject.surrogate_images is not None:
        fitted = replace(through, gradient="surrogate", loss="margin")
        attacks.append(Planned("surrogate", fitted, adaptive_pgd, survivors=True))
    if level:
        attacks.append(Planned("margin", replace(best, loss="margin"), adaptive_pgd, survivors=True))
    if level or subject.undefended:
        count, loss = min((2, 3, 9)[level], classes - 1), "dlr" if classes > 3 else "margin"
        targeted = replace(best, loss=loss, targets=count, steps=(10, 30, 50)[level], restarts=1)
        attacks.append(Planned("targeted", targeted, adaptive_pgd, survivors=True))
    if level:
        twice = replace(best, eot=2 * eot) if eot > 1 else replace(best, steps=2 * steps)
        attacks.append(Planned(AGAIN, twice, adaptive_pgd, survivors=True))
    if ball.norm == "Linf":
        queries = Threat("scores", steps=(50, 1000, 5000)[level], eot=eot)
        attacks.append(Planned("Square", queries, square, survivors=True))
    whole = subject.defences == subject.purifiers and len(subject.defences) < 2 and subject.clip_values == (0.0, 1.0)
    if level == 2 and whole and classes > 2:
        attacks.append(Planned("AutoAttack", replace(through, loss=None), public_auto_attack, survivors=True))
    return attacks
