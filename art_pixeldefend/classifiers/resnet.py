"""The paper's ResNet (PixelDefend, Appendix C.1)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from art_pixeldefend.classifiers.layers import BatchNorm, Network, Standardise, conv


class ResNet(Network):
    """Pre-activation residual network with leaky ReLU and 6 ``units`` + 2 layers (the paper: 62).

        x -> x + conv(act(bn(conv(act(bn(x))))))

    Three stages have ``width``, 2 ``width`` and 4 ``width`` feature maps; the second and third halve the resolution.
    Shortcuts between stages average 2 x 2 pixels and pad the missing feature maps with zeros.

    Args:
        image_shape: (C, H, W).
        classes: the number of classes.
        width: feature maps of the first stage (the paper: 16 for CIFAR-10, 4 for Fashion-MNIST).
        units: residual units per stage (the paper: 10).
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: int = 10, width: int = 16, units: int = 10) -> None:
        super().__init__()
        self.standardise = Standardise()
        self.stem = conv(image_shape[0], width)
        widths = [width] * (units + 1) + [2 * width] * units + [4 * width] * units
        self.units = nn.Sequential(*(Unit(a, b) for a, b in pairwise(widths)))
        self.norm = BatchNorm(4 * width)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        x = self.units(self.stem(self.standardise(x)))
        return self.head(_activate(self.norm(x)).mean((2, 3)))


class Unit(nn.Module):
    """A residual unit; if it has more output than input channels, it halves the resolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.wider = channels_out - channels_in
        self.norm1, self.conv1 = BatchNorm(channels_in), conv(channels_in, channels_out, 2 if self.wider else 1)
        self.norm2, self.conv2 = BatchNorm(channels_out), conv(channels_out, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) to (N, channels_out, H', W')."""
        change = self.conv1(_activate(self.norm1(x)))
        change = self.conv2(_activate(self.norm2(change)))
        return self._shortcut(x) + change

    def _shortcut(self, x: Tensor) -> Tensor:
        if not self.wider:
            return x
        before = self.wider // 2
        # ceil_mode keeps an odd last row or column, as the strided convolution does.
        return F.pad(F.avg_pool2d(x, 2, ceil_mode=True), (0, 0, 0, 0, before, self.wider - before))


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)
