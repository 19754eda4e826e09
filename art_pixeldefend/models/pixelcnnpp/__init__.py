"""PixelCNN++: the autoregressive density model, its network and mixture, and the decoders that find purified images."""

from art_pixeldefend.models.pixelcnnpp.model import PixelCNNpp, check_pixel_cnn

__all__ = ["PixelCNNpp", "check_pixel_cnn"]
