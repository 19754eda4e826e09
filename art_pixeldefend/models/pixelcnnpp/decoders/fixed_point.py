"""Decoding by fixed-point iteration: all conditionals at once, again and again, until no level changes.

An image that its own conditionals leave unchanged is the one that pixel-by-pixel decoding finds. Pixel 0 depends on
nothing, so it is right after one pass; pixel t depends on those before it, so it is right after t + 1 passes at the
latest, and usually long before (Song et al. 2020, arXiv:2002.03629; Wiggers and Hoogeboom 2020, arXiv:2002.09928).

It needs the network's ``forward`` and a rule, and nothing that the incremental engines use: a second oracle, for any
autoregressive model, that is much faster than the reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp.decoders.rules import Rule


@torch.no_grad()
def fixed_point_decode(forward: Callable[[Tensor], Tensor], x: Tensor, rule: Rule) -> Tensor:
    """Decode with any rule.

    Args:
        forward: maps levels (N, C, H, W) to outputs (N, P, H, W); those at a pixel depend on the pixels before it only.
        x: levels (N, C, H, W) from which the iteration starts.
        rule: chooses a pixel's levels from its outputs.

    Returns:
        Levels (N, C, H, W).
    """
    count, channels, height, width = x.shape
    size = height * width
    found = x.movedim(1, -1).reshape(count, size, channels).clone()
    moving = torch.arange(count, device=x.device)
    position = torch.arange(size, device=x.device)
    # After t passes the first t pixels are final. Skipping them ends the loop even if rounding made one alternate.
    for final in range(size):
        if not len(moving):
            break
        batch = found[moving].movedim(1, -1).reshape(-1, channels, height, width)
        outputs = forward(batch).flatten(2).movedim(1, -1)[:, final:]
        pixels = moving[:, None] * size + position[final:]
        levels = rule.choose_pixels(outputs.flatten(0, 1), pixels.flatten(), channels).view(len(moving), -1, channels)
        changed = (levels != found[moving, final:]).flatten(1).any(dim=1)
        found[moving, final:] = levels
        moving = moving[changed]
    return found.movedim(1, -1).reshape(x.shape)
