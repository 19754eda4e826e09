"""Building blocks of PixelCNN++ (Salimans et al. 2017, arXiv:1701.05517): causal, weight-normalised convolutions.

The network has two streams. ``u`` at row i depends on the rows above i; ``ul`` at (i, j) depends on the rows above i
and, in row i, on the columns left of j. Convolutions are causal by their padding (:data:`ABOVE`, :data:`ABOVE_LEFT`);
no weights are masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from art_pixeldefend.models.pixelcnnpp.passes import fused
from art_pixeldefend.models.pixelcnnpp.passes.fused import Padding

ABOVE = ((2, 3), (1, 1, 1, 0))  # kernel (rows, columns); padding (left, right, top, bottom): the ``u`` stream
ABOVE_LEFT = ((2, 2), (1, 0, 1, 0))  # the ``ul`` stream


def concat_elu(x: Tensor, dropout: float = 0.0, padding: Padding = (0, 0, 0, 0)) -> Tensor:
    """pad(dropout(elu([x, -x]))), stacked along the channels: (N, C, H, W) to (N, 2 C, H', W')."""
    if fused.applies(x):
        return fused.concat_elu(x, dropout, padding)
    y = F.dropout(F.elu(torch.cat([x, -x], dim=1)), dropout)
    return F.pad(y, padding) if any(padding) else y


def gate(x: Tensor, ab: Tensor) -> Tensor:
    """x + a sigmoid(b) for x (N, C, H, W) and ab (N, 2 C, H, W), a and b stacked along the channels."""
    if fused.applies(x, ab):
        return fused.gate(x, ab)
    a, b = ab.chunk(2, dim=1)
    return x + a * torch.sigmoid(b)


class WeightNormConv2d(nn.Module):
    """A convolution with weights g v / |v| (weight normalisation, Salimans and Kingma 2016, arXiv:1602.07868).

    Args:
        in_channels, out_channels: feature maps.
        kernel: (rows, columns).
        padding: (left, right, top, bottom) zeros around the input.
        stride: 1, or 2 to halve the resolution (rounded up).
        transposed: make it a transposed convolution of stride 2, whose outputs are cropped to twice the input's width.
        init_scale: standard deviation of the outputs after :meth:`initialise`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int] = (1, 1),
        padding: Padding = (0, 0, 0, 0),
        *,
        stride: int = 1,
        transposed: bool = False,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.padding, self.stride, self.transposed, self.init_scale = padding, stride, transposed, init_scale
        channels = (in_channels, out_channels) if transposed else (out_channels, in_channels)
        self.direction = nn.Parameter(torch.randn(*channels, *kernel) * 0.05)
        self.gain = nn.Parameter(torch.ones(out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self._kept: Tensor | None = None

    def weight(self) -> Tensor:
        """The effective weights, in the layout of ``conv2d`` (or ``conv_transpose2d``)."""
        out_axis = 1 if self.transposed else 0
        axes = [axis for axis in range(4) if axis != out_axis]
        shape = [-1 if axis == out_axis else 1 for axis in range(4)]
        norm = self.direction.square().sum(axes, keepdim=True).clamp_min(1e-24).sqrt()
        return self.direction * (self.gain.view(shape) / norm)

    def forward(self, x: Tensor, padded: bool = False) -> Tensor:
        """(N, in_channels, H, W), with the padding around it if ``padded``, to (N, out_channels, H', W')."""
        if self.transposed:
            # Kernels of 3 columns are centred: their first output column lies outside the image.
            first = (self.direction.shape[-1] - 1) // 2
            y = F.conv_transpose2d(x, self._current_weight(), self.bias, stride=2)
            return y[..., first : first + 2 * x.shape[-1]]
        if not padded and any(self.padding):
            x = F.pad(x, self.padding)
        return F.conv2d(x, self._current_weight(), self.bias, stride=self.stride)

    def _current_weight(self) -> Tensor:
        if self._kept is not None:
            return self._kept
        if not self.transposed and self.direction.dtype == torch.float32 and fused.applies(self.direction):
            return fused.weight_norm(self.direction, self.gain)
        return self.weight()

    @torch.no_grad()
    def initialise(self, x: Tensor, padded: bool = False) -> None:
        """Set gain and bias so that the outputs for a batch ``x`` have mean 0 and deviation ``init_scale``."""
        self.gain.fill_(1.0)
        self.bias.zero_()
        y = self.forward(x, padded)  # not self(x), whose hook calls this method
        deviation = y.var((0, 2, 3), unbiased=False).sqrt()
        # Constant outputs, as of convolutions that reach no pixel of a tiny image, would be amplified rounding errors.
        gain = self.init_scale / torch.where(deviation > 1e-4, deviation, 1.0)
        self.bias.copy_(-y.mean((0, 2, 3)) * gain)
        self.gain.copy_(gain)


@contextmanager
def kept_weights(module: nn.Module) -> Iterator[None]:
    """Compute the weights of each layer only once in the context, during which parameters must not change."""
    layers = [layer for layer in module.modules() if isinstance(layer, WeightNormConv2d)]
    try:
        with torch.no_grad():
            for layer in layers:
                layer._kept = layer.weight()
        yield
    finally:
        for layer in layers:
            layer._kept = None


def pointwise(in_channels: int, out_channels: int) -> WeightNormConv2d:
    """A 1 x 1 convolution ("network in network")."""
    return WeightNormConv2d(in_channels, out_channels)


class GatedResnet(nn.Module):
    """x + a sigmoid(b) with (a, b) = conv(dropout(celu(conv(celu(x)) + skip(celu(aside))))).

    Args:
        filters: feature maps F of ``x``.
        field: :data:`ABOVE` or :data:`ABOVE_LEFT`.
        aside_filters: feature maps of the optional second input ``aside``, 0 for none.
        dropout: probability, between the two convolutions.
    """

    def __init__(self, filters: int, field: tuple, aside_filters: int = 0, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv_in = WeightNormConv2d(2 * filters, filters, *field)
        self.skip = pointwise(2 * aside_filters, filters) if aside_filters else None
        self.dropout = nn.Dropout(dropout)
        self.conv_out = WeightNormConv2d(2 * filters, 2 * filters, *field, init_scale=0.1)

    def forward(self, x: Tensor, aside: Tensor | None = None) -> Tensor:
        """(N, F, H, W) and (N, aside_filters, H, W) to (N, F, H, W)."""
        y = self.conv_in(concat_elu(x, padding=self.conv_in.padding), True)
        if self.skip is not None and aside is not None:
            y = y + self.skip(concat_elu(aside))
        dropout = self.dropout.p if self.training else 0.0
        return gate(x, self.conv_out(concat_elu(y, dropout, self.conv_out.padding), True))
