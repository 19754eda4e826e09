"""Detectors: ART evasion detectors that tell adversarial images from clean ones."""

from art_pixeldefend.detectors.pixel_defend import PixelDefendDetector

__all__ = ["PixelDefendDetector"]
