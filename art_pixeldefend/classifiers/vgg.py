"""The paper's VGG (PixelDefend, Appendix C.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from art_pixeldefend.classifiers.layers import BatchNorm, Network, Standardise, conv


class VGG(Network):
    """Ten convolutions with batch normalisation in four blocks, then two fully connected layers with dropout.

    (Appendix C.2 calls it VGG-16 and lists these twelve layers.)

    Args:
        image_shape: (C, H, W).
        classes: the number of classes.
        width: feature maps of the first block (the paper: 16 for CIFAR-10, 4 for Fashion-MNIST); the others have 8, 32
            and 32 times as many, and the hidden fully connected layer has 32 times as many units.
        dropout: probability before each fully connected layer.
    """

    BLOCKS = ((1, 2), (8, 2), (32, 3), (32, 3))  # feature maps in units of width, convolutions

    def __init__(
        self, image_shape: tuple[int, int, int], classes: int = 10, width: int = 16, dropout: float = 0.5
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [Standardise()]
        channels = image_shape[0]
        for factor, count in self.BLOCKS:
            for _ in range(count):
                layers += [conv(channels, factor * width), BatchNorm(factor * width), nn.ReLU()]
                channels = factor * width
            layers.append(nn.MaxPool2d(2, ceil_mode=True))  # keeps an odd last row or column, and allows 8 x 8
        self.features = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            flat = self.features.eval()(torch.zeros(1, *image_shape)).shape[1]
        hidden = 32 * width
        self.head = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(flat, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, classes)
        )
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        return self.head(self.features(x))
