"""Algorithm 1 of PixelDefend (arXiv:1710.10766) as it is printed: the oracle that faster engines must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp, mixture


@torch.no_grad()
def decode(pixel_cnn: PixelCNNpp, x: Tensor, eps: int) -> Tensor:
    """Purified levels (N, C, H, W) of levels ``x``: a pass per pixel, every one of the 256 levels weighed."""
    levels = torch.arange(mixture.LEVELS, device=x.device)
    purified = x.clone()
    _, channels, rows, columns = x.shape
    for i in range(rows):
        for j in range(columns):
            params = pixel_cnn(purified)[:, :, i, j].double()
            for k in range(channels):
                value = x[:, k, i, j, None].long()
                feasible = (levels >= value - eps) & (levels <= value + eps)
                parts = mixture.components(params, purified[:, :, i, j].double(), k)
                log_p = mixture.log_prob(parts.for_each_level(), levels.double())
                purified[:, k, i, j] = log_p.where(feasible, -torch.inf).argmax(dim=1).to(x.dtype)
    return purified
