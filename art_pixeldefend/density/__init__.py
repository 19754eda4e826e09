"""The density model: PixelCNN++, its mixture, its checkpoints, its trainer."""

from art_pixeldefend.density.pixelcnnpp import PixelCNNpp

__all__ = ["PixelCNNpp"]
