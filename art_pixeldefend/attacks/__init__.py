"""ART evasion attacks that ART lacks, and the registry of all attacks of the evaluation.

- ``registry``: all attacks by name.
- ``through``: gradients through purifiers, with replayed draws.
- ``budget``: balls of whole levels.
- ``clipped``: keeps any attack in such a ball.
- ``latent``: attacks projections by a generator's latents.
- ``surrogate``: learns a stand-in for a purifier.
- ``losses``: what attacks maximise.
- ``training``: attacks for adversarial training.
- the others: one attack each.
"""

from art_pixeldefend.attacks.adaptive_pgd import AdaptivePGD
from art_pixeldefend.attacks.auto_attack import auto_attack
from art_pixeldefend.attacks.carlini_wagner import CarliniWagnerLInf
from art_pixeldefend.attacks.clipped import Clipped
from art_pixeldefend.attacks.deep_fool import DeepFoolLInf
from art_pixeldefend.attacks.detector_aware import DetectorAware
from art_pixeldefend.attacks.latent import LatentAttack
from art_pixeldefend.attacks.overpowered import OverpoweredAttack, Pairs
from art_pixeldefend.attacks.random_noise import RandomNoise
from art_pixeldefend.attacks.registry import ATTACKS, PAPER, Attack, make_attack, unclipped
from art_pixeldefend.attacks.square import Square
from art_pixeldefend.attacks.surrogate import Surrogate, fit_surrogate
from art_pixeldefend.attacks.training import HalfNormalBIM, HalfNormalFGSM, TrainingPGD

__all__ = [
    "ATTACKS",
    "PAPER",
    "AdaptivePGD",
    "Attack",
    "CarliniWagnerLInf",
    "Clipped",
    "DeepFoolLInf",
    "DetectorAware",
    "HalfNormalBIM",
    "HalfNormalFGSM",
    "LatentAttack",
    "OverpoweredAttack",
    "Pairs",
    "RandomNoise",
    "Square",
    "Surrogate",
    "TrainingPGD",
    "auto_attack",
    "fit_surrogate",
    "make_attack",
    "unclipped",
]
