"""All conditionals at once, again and again, until nothing changes.

An image that its own conditionals leave alone is the one that pixel-by-pixel decoding finds: pixel 0 depends on
nothing, so it is right after one pass; pixel t depends on those before it only, so it is right after t + 1 passes at
the latest, and as a rule long before (Song et al. 2020, arXiv:2002.03629; Wiggers and Hoogeboom 2020,
arXiv:2002.09928).
"""

from __future__ import annotations

import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.decoders.rules import Rule


@torch.no_grad()
def decode(pixel_cnn: PixelCNNpp, x: Tensor, rule: Rule) -> Tensor:
    """The levels (N, C, H, W) that ``rule`` chooses, starting the iteration from levels ``x``."""
    count, channels, height, width = x.shape
    size = height * width
    found = x.movedim(1, -1).reshape(count, size, channels).clone()
    moving = torch.arange(count, device=x.device)
    position = torch.arange(size, device=x.device)
    # Pixels before the pass's number are final. Leaving them alone ends the loop even if rounding made one waver.
    for done in range(size):
        if not len(moving):
            break
        batch = found[moving].movedim(1, -1).reshape(-1, channels, height, width)
        params = pixel_cnn(batch).flatten(2).movedim(1, -1)[:, done:]
        pixels = moving[:, None] * size + position[done:]
        levels = rule.choose_pixels(params.flatten(0, 1), pixels.flatten(), channels).view(len(moving), -1, channels)
        changed = (levels != found[moving, done:]).flatten(1).any(dim=1)
        found[moving, done:] = levels
        moving = moving[changed]
    return found.movedim(1, -1).reshape(x.shape)
