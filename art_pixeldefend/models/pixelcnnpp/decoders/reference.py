"""Algorithm 1 of PixelDefend (arXiv:1710.10766) as printed: the oracle for the faster engines."""

from __future__ import annotations

import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp, mixture
from art_pixeldefend.models.pixelcnnpp.decoders.rules import check_finite


@torch.no_grad()
def reference_decode(pixel_cnn: PixelCNNpp, x: Tensor, eps: int) -> Tensor:
    """Purified levels (N, C, H, W) of levels ``x``: one forward pass per pixel, log_prob at each of the 256 levels."""
    levels = torch.arange(mixture.LEVELS, device=x.device)
    purified = x.clone()
    _, channels, rows, columns = x.shape
    for i in range(rows):
        for j in range(columns):
            params = check_finite(pixel_cnn(purified)[:, :, i, j].double())
            for k in range(channels):
                value = x[:, k, i, j, None].long()
                feasible = (levels >= value - eps) & (levels <= value + eps)
                parts = mixture.components(params, purified[:, :, i, j].double(), k)
                log_p = mixture.log_prob(parts.for_each_level(), levels.double())
                purified[:, k, i, j] = log_p.where(feasible, -torch.inf).argmax(dim=1).to(x.dtype)
    return purified
