"""The layers that both networks share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """A classifier of images in [0, 1] that can be saved and built again.

    Attributes:
        network: the name of its architecture, a key of ``NETWORKS``.
        configuration: the arguments of its constructor.
        provenance: how it was trained; JSON-serialisable.
    """

    network: str
    configuration: dict[str, Any]
    provenance: dict[str, Any]


class Standardise(nn.Module):
    """Standardise each image in [0, 1] to mean 0 and deviation 1 over channels, rows and columns.

    The deviation, in levels, is clamped to at least 1 / sqrt(C H W), so that uniform images stay finite (TensorFlow's
    ``per_image_standardization``, which the paper's code puts in front of both networks).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        levels = x * 255.0
        centred = levels - levels.mean((1, 2, 3), keepdim=True)
        # The square root of the clamped variance has a finite gradient for uniform images; that of std() is NaN.
        variance = centred.square().mean((1, 2, 3), keepdim=True)
        return centred / variance.clamp_min(1 / math.prod(x.shape[1:])).sqrt()


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation; without trainable parameters, in evaluation mode, one fused multiply-add.

    Attacks take thousands of gradients with respect to images, a third of whose time goes into torch's own layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        if self.training or self.weight.requires_grad:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None  # this class always tracks them
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * scale
        scale, shift = (value.to(x.dtype)[:, None, None] for value in (scale, shift))
        return torch.addcmul(shift, x, scale)


def conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """A 3 x 3 convolution without bias, for use with batch normalisation."""
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
