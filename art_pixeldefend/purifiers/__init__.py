"""Purifiers: ART preprocessors that remove adversarial perturbations before a classifier sees an image."""

from art_pixeldefend.purifiers.adaptive_pixel_defend import AdaptivePixelDefend
from art_pixeldefend.purifiers.base import Purifier
from art_pixeldefend.purifiers.pixel_defend import PixelDefend

__all__ = ["AdaptivePixelDefend", "PixelDefend", "Purifier"]
