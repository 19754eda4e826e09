"""Detectors: ART evasion detectors that tell adversarial images from clean ones, and the scores they use."""

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
