"""The density model: PixelCNN++, its mixture, its checkpoints, its trainer."""

from art_pixeldefend.density.pixelcnnpp import PixelCNNpp, check_pixel_cnn

__all__ = ["PixelCNNpp", "check_pixel_cnn"]
