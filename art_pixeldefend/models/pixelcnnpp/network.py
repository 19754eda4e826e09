"""The PixelCNN++ network, from images to the mixture parameters of every pixel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from art_pixeldefend.models.pixelcnnpp.layers import ABOVE, ABOVE_LEFT, GatedResnet, WeightNormConv2d

STAGES = 3  # resolutions: full, half, quarter


class Stream(nn.Module):
    """Gated resnets of both streams, ``u`` and ``ul``, at one resolution, and the change of resolution after them."""

    def __init__(self, filters: int, resnets: int, asides: tuple[int, int], dropout: float) -> None:
        super().__init__()
        self.u = nn.ModuleList(GatedResnet(filters, ABOVE, asides[0], dropout) for _ in range(resnets))
        self.ul = nn.ModuleList(GatedResnet(filters, ABOVE_LEFT, asides[1], dropout) for _ in range(resnets))
        self.resize_u: WeightNormConv2d | None = None
        self.resize_ul: WeightNormConv2d | None = None

    def pairs(self) -> Iterator[tuple[GatedResnet, GatedResnet]]:
        """Pairs of gated resnets, of ``u`` and of ``ul``, in the order in which they are applied."""
        return cast(Iterator[tuple[GatedResnet, GatedResnet]], zip(self.u, self.ul, strict=True))

    def then(self, filters: int, *, upwards: bool) -> Stream:
        """Append strided convolutions, or transposed ones if ``upwards``, that lead to the next resolution."""
        how: dict = {"transposed": True} if upwards else {"stride": 2}
        padding = [(0, 0, 0, 0)] * 2 if upwards else [ABOVE[1], ABOVE_LEFT[1]]
        self.resize_u = WeightNormConv2d(filters, filters, ABOVE[0], padding[0], **how)
        self.resize_ul = WeightNormConv2d(filters, filters, ABOVE_LEFT[0], padding[1], **how)
        return self


class PixelCNNppNetwork(nn.Module):
    """PixelCNN++ (Salimans et al. 2017, arXiv:1701.05517), figure 2.

    Args:
        channels: C of the image.
        outputs: parameters per pixel.
        filters: feature maps F.
        resnets: gated resnets per stage on the way up; the last two stages on the way down have one more.
        dropout: probability inside the gated resnets.
    """

    def __init__(self, channels: int, outputs: int, filters: int, resnets: int, dropout: float) -> None:
        super().__init__()
        # An additional input channel of ones distinguishes the zeros of the padding from those of the image.
        self.u_start = WeightNormConv2d(channels + 1, filters, (2, 3), (1, 1, 2, 0))
        self.ul_start_above = WeightNormConv2d(channels + 1, filters, (1, 3), (1, 1, 1, 0))
        self.ul_start_left = WeightNormConv2d(channels + 1, filters, (2, 1), (1, 0, 1, 0))
        self.up = nn.ModuleList(Stream(filters, resnets, (0, filters), dropout) for _ in range(STAGES))
        self.down = nn.ModuleList(
            Stream(filters, resnets + (stage > 0), (filters, 2 * filters), dropout) for stage in range(STAGES)
        )
        for before_last in range(STAGES - 1):
            cast(Stream, self.up[before_last]).then(filters, upwards=False)
            cast(Stream, self.down[before_last]).then(filters, upwards=True)
        self.head = WeightNormConv2d(filters, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] to (N, P, H, W)."""
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        # Shift by one: row i of u depends on the rows above i, column j of ul in addition on the columns left of j.
        with torch.autocast(x.device.type, enabled=False):  # bf16 cannot tell neighbouring levels apart
            u = self.u_start(x)[:, :, :-1]
            ul = self.ul_start_above(x)[:, :, :-1] + self.ul_start_left(x)[:, :, :, :-1]
        us, uls = [u], [ul]
        for stage in cast(Iterable[Stream], self.up):
            for resnet_u, resnet_ul in stage.pairs():
                u = resnet_u(u)
                ul = resnet_ul(ul, u)
                us.append(u)
                uls.append(ul)
            if stage.resize_u is not None and stage.resize_ul is not None:
                u, ul = stage.resize_u(u), stage.resize_ul(ul)
                us.append(u)
                uls.append(ul)
        u, ul = us.pop(), uls.pop()
        for stage in cast(Iterable[Stream], self.down):
            for resnet_u, resnet_ul in stage.pairs():
                u = resnet_u(u, us.pop())
                ul = resnet_ul(ul, torch.cat([u, uls.pop()], dim=1))
            if stage.resize_u is not None and stage.resize_ul is not None:
                # Odd resolutions were rounded up by the strided convolutions: crop to the resolution before them.
                rows, columns = us[-1].shape[-2:]
                u = stage.resize_u(u)[:, :, :rows, :columns]
                ul = stage.resize_ul(ul)[:, :, :rows, :columns]
        with torch.autocast(x.device.type, enabled=False):  # nor means of the mixture that differ by one level
            return self.head(nn.functional.elu(ul.to(self.head.bias.dtype)))
