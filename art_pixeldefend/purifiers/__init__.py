"""Purifiers: ART preprocessors that remove adversarial perturbations before a classifier sees an image.

- ``base``: what all purifiers share.
- ``purified_model``: a purifier and a classifier as one module.
- ``adaptive_updates``: the update rule of ADP.
- ``soft_window``: the implicit gradient of PixelDefend.
- ``logits``: differentiable logits of ART classifiers with defences.
- the others: one purifier each.
"""

from art_pixeldefend.purifiers.adaptive_pixel_defend import AdaptivePixelDefend
from art_pixeldefend.purifiers.adaptive_updates import AdaptiveStep, adaptive_updates
from art_pixeldefend.purifiers.base import Purifier
from art_pixeldefend.purifiers.deep_image_prior import DeepImagePrior
from art_pixeldefend.purifiers.manifold_projection import ManifoldProjection
from art_pixeldefend.purifiers.pixel_defend import PixelDefend
from art_pixeldefend.purifiers.purified_model import PurifiedModel
from art_pixeldefend.purifiers.score_purifier import ScoreDenoiser, ScorePurifier

__all__ = [
    "AdaptivePixelDefend",
    "AdaptiveStep",
    "DeepImagePrior",
    "ManifoldProjection",
    "PixelDefend",
    "PurifiedModel",
    "Purifier",
    "ScoreDenoiser",
    "ScorePurifier",
    "adaptive_updates",
]
