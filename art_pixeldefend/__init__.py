"""PixelDefend (Song et al., ICLR 2018, arXiv:1710.10766) for the Adversarial Robustness Toolbox."""

__version__ = "0.1.0"

from art_pixeldefend.decoding import greedy_decode
from art_pixeldefend.defences import AdaptivePixelDefend, PixelDefend, PixelDefendDetector
from art_pixeldefend.density import PixelCNNpp

__all__ = ["AdaptivePixelDefend", "PixelCNNpp", "PixelDefend", "PixelDefendDetector", "greedy_decode"]
