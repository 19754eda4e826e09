"""The ART classes: purifiers as preprocessors, the detector as an evasion detector."""

from art_pixeldefend.defences.adaptive_pixel_defend import AdaptivePixelDefend
from art_pixeldefend.defences.detector import PixelDefendDetector
from art_pixeldefend.defences.pixel_defend import PixelDefend
from art_pixeldefend.defences.purifier import Purifier

__all__ = ["AdaptivePixelDefend", "PixelDefend", "PixelDefendDetector", "Purifier"]
