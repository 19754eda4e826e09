"""Detectors: ART evasion detectors that tell adversarial images from clean ones, and the scores they use.

- ``scores``: anomaly scores of images.
- ``named``: the same by their names in the shell.
- ``conformal``: p-values of scores.
- ``conformal_detector``, ``pixel_defend``: the detectors.
- ``false_alarms``: how often clean images are flagged.
- ``relaxation``: differentiable p-values, for attacks.
"""

from art_pixeldefend.detectors.conformal_detector import ConformalDetector
from art_pixeldefend.detectors.pixel_defend import PixelDefendDetector
from art_pixeldefend.detectors.scores import (
    ComplexityCorrectedLikelihood,
    DenoisingError,
    Likelihood,
    LikelihoodRatio,
    PredictionChange,
    PurifierChange,
    Score,
    ScoreNorm,
)

__all__ = [
    "ComplexityCorrectedLikelihood",
    "ConformalDetector",
    "DenoisingError",
    "Likelihood",
    "LikelihoodRatio",
    "PixelDefendDetector",
    "PredictionChange",
    "PurifierChange",
    "Score",
    "ScoreNorm",
]
