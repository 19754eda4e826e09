"""The paper's attacks by name, with its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from art.attacks.attack import EvasionAttack
from art.attacks.evasion import BasicIterativeMethod, CarliniLInfMethod, DeepFool, FastGradientMethod

from art_pixeldefend.attacks.budget import bim_steps, level
from art_pixeldefend.attacks.carlini_wagner import CarliniWagnerLInf
from art_pixeldefend.attacks.clipped import Clipped
from art_pixeldefend.attacks.deep_fool import DeepFoolLInf
from art_pixeldefend.attacks.random_noise import RandomNoise
from art_pixeldefend.validation import check_eps


@dataclass(frozen=True)
class Entry:
    """One attack of the registry.

    Args:
        build: the ART attack of (classifier, eps in levels, batch_size, seed, further settings).
        sees_classifier: whether its images depend on the classifier.
        uses_eps: whether they depend on eps; if not, they are clipped to the ball afterwards.
        true_labels: whether the paper gives it the true labels; the others attack the model's own predictions.
        note: what a table should say about it.
        version: raised when its images change, so that those kept from before are not taken for them.
    """

    build: Callable[..., EvasionAttack]
    sees_classifier: bool = True
    uses_eps: bool = True
    true_labels: bool = False
    note: str = ""
    version: int = 1


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


ATTACKS: dict[str, Entry] = {
    "rand": Entry(_rand, sees_classifier=False),
    "fgsm": Entry(_fgsm),
    "bim": Entry(_bim, true_labels=True),
    "deepfool": Entry(
        _deepfool, uses_eps=False, note="L-infinity, as in the paper's code; ART's own is deepfool-l2", version=2
    ),
    "deepfool-l2": Entry(_deepfool_l2, uses_eps=False, note="ART's DeepFool"),
    "cw": Entry(_cw, uses_eps=False, true_labels=True, note="L-infinity, as in the paper's code; ART's own is cw-art"),
    "cw-art": Entry(_cw_art, uses_eps=False, true_labels=True, note="ART's CarliniLInfMethod with its own defaults"),
}
PAPER = ("rand", "fgsm", "bim", "deepfool", "cw")


def unclipped(
    name: str, classifier: Any, eps: int, *, batch_size: int = 128, seed: int = 0, **settings: Any
) -> EvasionAttack:
    """The attack of this name before its images are rounded to 8 bits and clipped to the ball.

    Args:
        name: one of ``ATTACKS``.
        classifier: an ART classifier with gradients and clip values, whose outputs are logits.
        eps: radius in levels, 0..255.
        batch_size: images at a time.
        seed: of what is random in it.
        settings: passed on to the attack's class, instead of the paper's.

    Raises:
        ValueError: for an unknown name, or an eps that is not as described.
    """
    if name not in ATTACKS:
        raise ValueError(f"name must be one of {', '.join(ATTACKS)}, got {name!r}")
    return ATTACKS[name].build(classifier, check_eps("eps", eps), batch_size, seed, **settings)


def make_attack(
    name: str, classifier: Any, eps: int, *, batch_size: int = 128, seed: int = 0, **settings: Any
) -> Clipped:
    """The paper's attack of this name: its images are 8-bit ones within ``eps`` levels of the input.

    Arguments and errors are those of :func:`unclipped`.

        x_attacked = make_attack("bim", classifier, eps=8).generate(x)
    """
    return Clipped(unclipped(name, classifier, eps, batch_size=batch_size, seed=seed, **settings), eps=eps)
