"""The attacks of the evaluation by name, with everything that a grid needs to know about each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from art.attacks.attack import EvasionAttack
from art.attacks.evasion import BasicIterativeMethod, CarliniLInfMethod, DeepFool, FastGradientMethod

from art_pixeldefend.attacks.adaptive_pgd import AdaptivePGD
from art_pixeldefend.attacks.budget import bim_steps, level
from art_pixeldefend.attacks.carlini_wagner import CarliniWagnerLInf
from art_pixeldefend.attacks.clipped import Clipped
from art_pixeldefend.attacks.deep_fool import DeepFoolLInf
from art_pixeldefend.attacks.detector_aware import DetectorAware
from art_pixeldefend.attacks.random_noise import RandomNoise
from art_pixeldefend.attacks.square import Square
from art_pixeldefend.validation import check_choice, check_eps


@dataclass(frozen=True)
class Attack:
    """An entry of ``ATTACKS``.

    Args:
        build: returns the ART attack for (classifier, eps in levels, batch_size, seed, further settings).
        title: its name in tables and figures.
        cost: gradients it computes per image, or a function that returns them for eps in levels. A query without one
            counts for 0.4.
        sees_classifier: whether its images depend on the classifier.
        uses_eps: whether its images depend on eps. If not, the same images are clipped to each ball afterwards.
        true_labels: whether it is given the true labels; otherwise it attacks the classifier's own predictions.
        note: a remark for the tables that show it.
        settings: the further settings that a threat may change: of ``"eot"``, ``"restarts"``, ``"steps"``, ``"loss"``
            and ``"targets"``.
        needs: settings without which it cannot be built, so that no grid can run it.
        version: to be raised when its images change; stored images of earlier versions are then made again.

    Example:
        >>> attack = ATTACKS["bim"]
        >>> attack.title, attack.gradients(eps=8)
        ('BIM', 10)
    """

    build: Callable[..., EvasionAttack]
    title: str
    cost: int | Callable[[int], int]
    sees_classifier: bool = True
    uses_eps: bool = True
    true_labels: bool = False
    note: str = ""
    settings: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    version: int = 1

    @property
    def predictions(self) -> bool:
        """Whether it attacks the classifier's own predictions."""
        return self.sees_classifier and not self.true_labels

    def gradients(self, eps: int) -> int:
        """Gradients that it computes per image within ``eps`` levels; an estimate where the number varies."""
        return self.cost(eps) if callable(self.cost) else self.cost


def _rand(classifier: Any, eps: int, batch_size: int, seed: int, **settings: Any) -> EvasionAttack:
    return RandomNoise(classifier, eps=eps, seed=seed, **settings)


def _fgsm(classifier: Any, eps: int, batch_size: int, seed: int, **settings: Any) -> EvasionAttack:
    radius = eps * level(classifier)
    return FastGradientMethod(classifier, eps=radius, eps_step=max(radius, 1e-9), batch_size=batch_size, **settings)


def _bim(classifier: Any, eps: int, batch_size: int, seed: int, **settings: Any) -> EvasionAttack:
    step, steps = level(classifier), bim_steps(eps)
    settings = {"eps_step": step, "max_iter": steps, "verbose": False} | settings
    return BasicIterativeMethod(classifier, eps=eps * step, batch_size=batch_size, **settings)


def _deepfool(classifier: Any, eps: int, batch_size: int, seed: int, **settings: Any) -> EvasionAttack:
    return DeepFoolLInf(classifier, batch_size=batch_size, **settings)


def _deepfool_l2(classifier: Any, eps: int, batch_size: int, seed: int, **settings: Any) -> EvasionAttack:
    settings = {"max_iter": 50, "epsilon": 0.02, "verbose": False} | settings
    return DeepFool(classifier, batch_size=batch_size, **settings)


def _cw(classifier: Any, eps: int, batch_size: int, seed: int, **settings: Any) -> EvasionAttack:
    return CarliniWagnerLInf(classifier, batch_size=batch_size, **settings)


def _cw_art(classifier: Any, eps: int, batch_size: int, seed: int, **settings: Any) -> EvasionAttack:
    return CarliniLInfMethod(classifier, batch_size=batch_size, **{"verbose": False} | settings)


def _adaptive(**defaults: Any) -> Callable[..., EvasionAttack]:
    def build(classifier: Any, eps: int, batch_size: int, seed: int, **settings: Any) -> EvasionAttack:
        settings = {"round_to_levels": True} | defaults | settings
        return AdaptivePGD(classifier, eps=eps * level(classifier), batch_size=batch_size, seed=seed, **settings)

    return build


def _square(classifier: Any, eps: int, batch_size: int, seed: int, **settings: Any) -> EvasionAttack:
    return Square(classifier, eps=eps * level(classifier), batch_size=batch_size, seed=seed, **settings)


ADAPTIVE = ("eot", "restarts", "steps", "loss", "targets")


def _detector_aware(classifier: Any, eps: int, batch_size: int, seed: int, **settings: Any) -> EvasionAttack:
    radius = eps * level(classifier)
    return DetectorAware(classifier, eps=radius, batch_size=batch_size, seed=seed, **{"detector": None} | settings)


# The costs of DeepFool and CW are means over Fashion-MNIST images and an undefended ResNet-62.
ATTACKS: dict[str, Attack] = {
    "rand": Attack(_rand, "RAND", cost=0, sees_classifier=False),
    "fgsm": Attack(_fgsm, "FGSM", cost=1),
    "bim": Attack(_bim, "BIM", cost=bim_steps, true_labels=True),
    "deepfool": Attack(
        _deepfool, "DeepFool", cost=60, uses_eps=False, version=3,
        note="L-infinity, as in the paper's code, but each step is rounded away from zero to whole levels; ART's own "
        "is deepfool-l2",
    ),
    "deepfool-l2": Attack(_deepfool_l2, "DeepFool (L2)", cost=100, uses_eps=False, note="ART's DeepFool"),
    "cw": Attack(
        _cw, "CW", cost=300, uses_eps=False, true_labels=True,
        note="L-infinity, with the constants of the paper's code: it ends with 100 steps in vain; changes are rounded "
        "away from zero to whole levels; ART's own is cw-art",
    ),
    "cw-art": Attack(
        _cw_art, "CW (ART)", cost=3000, uses_eps=False, true_labels=True,
        note="ART's CarliniLInfMethod with its own defaults",
    ),
    "apgd": Attack(
        _adaptive(loss="ce"), "APGD", cost=51, true_labels=True, settings=ADAPTIVE,
        note="AdaptivePGD on the cross-entropy, best image of all steps: 50, if the threat does not say otherwise",
    ),
    "apgd-margin": Attack(
        _adaptive(loss="margin"), "APGD, margin", cost=51, true_labels=True, settings=ADAPTIVE,
        note="AdaptivePGD on the margin, best image of all steps: 50, if the threat does not say otherwise",
    ),
    "apgd-targets": Attack(
        _adaptive(loss="dlr", targets=3), "APGD, targets", cost=153, true_labels=True, settings=ADAPTIVE,
        note="AdaptivePGD on the DLR loss towards each of the 3 most likely other classes, best image of all steps: 50 "
        "each, if the threat does not say otherwise",
    ),
    "square": Attack(
        _square, "Square", cost=400, true_labels=True, settings=("steps",),
        note="1,000 queries without gradients, margins averaged over draws of a random defence",
    ),
    "detector-aware": Attack(
        _detector_aware, "detector-aware", cost=250, true_labels=True, needs=("detector",),
        note="DetectorAware: misclassified and not flagged",
    ),
}  # fmt: skip
PAPER = ("rand", "fgsm", "bim", "deepfool", "cw")  # those of PixelDefend's tables


def unclipped(
    name: str, classifier: Any, eps: int, *, batch_size: int = 128, seed: int = 0, **settings: Any
) -> EvasionAttack:
    """Return the attack of this name before its images are rounded to 8 bits and clipped to the ball.

    Args:
        name: a key of ``ATTACKS``.
        classifier: an ART classifier with gradients and clip values, whose outputs are logits.
        eps: radius in levels, 0..255.
        batch_size: images at a time.
        seed: of the attack's own random numbers.
        settings: arguments of the attack's class that replace the paper's.

    Raises:
        ValueError: for an unknown name, or an eps that is not as described.
    """
    entry = ATTACKS[check_choice("name", name, ATTACKS)]
    return entry.build(classifier, check_eps("eps", eps), batch_size, seed, **settings)


def make_attack(
    name: str, classifier: Any, eps: int, *, batch_size: int = 128, seed: int = 0, **settings: Any
) -> Clipped:
    """Return the attack of this name; its images are 8-bit images within ``eps`` levels of the input.

    Arguments and errors are those of :func:`unclipped`.

    Example:
        >>> import numpy as np
        >>> from torch import nn
        >>> from art.estimators.classification import PyTorchClassifier
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
        >>> classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 4, 4), 10, clip_values=(0, 1))
        >>> x = np.full((2, 1, 4, 4), 0.5, np.float32)
        >>> attacked = make_attack("bim", classifier, eps=8).generate(x)
        >>> float(np.abs(attacked - x).max() * 255).__round__()
        8
    """
    return Clipped(unclipped(name, classifier, eps, batch_size=batch_size, seed=seed, **settings), eps=eps)
