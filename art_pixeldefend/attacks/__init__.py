"""What the paper's grid needs and ART lacks, as ART evasion attacks; and all its attacks by name."""

from art_pixeldefend.attacks.carlini_wagner import CarliniWagnerLInf
from art_pixeldefend.attacks.clipped import Clipped
from art_pixeldefend.attacks.deep_fool import DeepFoolLInf
from art_pixeldefend.attacks.random_noise import RandomNoise
from art_pixeldefend.attacks.registry import ATTACKS, PAPER, make_attack, unclipped
from art_pixeldefend.attacks.training import HalfNormalBIM, HalfNormalFGSM

__all__ = [
    "ATTACKS",
    "PAPER",
    "CarliniWagnerLInf",
    "Clipped",
    "DeepFoolLInf",
    "HalfNormalBIM",
    "HalfNormalFGSM",
    "RandomNoise",
    "make_attack",
    "unclipped",
]
