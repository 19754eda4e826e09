"""Every activation computed once, in plain PyTorch, on any device.

When a row begins, all that depends on the rows above is computed for its whole width: the ``u`` stream, and of every
convolution of the ``ul`` stream the taps above, the skip from ``u`` and the biases. Then, stretch by stretch of the
row, the taps in the row itself follow, the head, and the choice of the levels. Position (I, J) of a lower resolution
falls due at the pixel (2 I, 2 J) of the one above it.

A stretch is one pixel where the batch is large. A few images leave PyTorch little to do at a pixel but to call
functions; for them it is the rest of the row, again and again, until its levels stay the same: each time those up to
the first that changed are final (Song et al. 2020, arXiv:2002.03629).
"""

from __future__ import annotations

import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.decoders.cached.rows import are_few
from art_pixeldefend.models.pixelcnnpp.decoders.cached.walk import Walk
from art_pixeldefend.models.pixelcnnpp.decoders.rules import Rule
from art_pixeldefend.models.pixelcnnpp.decoders.threads import share_out

__all__ = ["decode"]

ALIGNED = 4  # columns: a stretch of several begins at a multiple of it, so that few different ones occur


def decode(pixel_cnn: PixelCNNpp, x: Tensor, rule: Rule) -> Tensor:
    """The levels (N, C, H, W) that ``rule`` chooses; levels ``x`` are where the search for a stretch's begins."""

    def part(first: int, end: int) -> Tensor:
        with torch.inference_mode():  # a fifth faster than without gradients only, where there are few images
            found = _decode(pixel_cnn, x[first:end], rule, first)
        return found.clone()  # tensors made in that mode cannot be written to outside of it

    return share_out(part, len(x), x.device)


def _decode(pixel_cnn: PixelCNNpp, x: Tensor, rule: Rule, number: int) -> Tensor:
    """Levels of ``x``, whose first image has this number in the batch that the rule knows."""
    count, _, height, width = x.shape
    if not count:
        return x
    walk = Walk(pixel_cnn, count)
    # Rows, columns, images, channels: as the walk has them.
    found = x.permute(2, 3, 0, 1).clone(memory_format=torch.contiguous_format)
    numbers = torch.arange(height * width, device=x.device).view(height, width, 1)
    numbers = numbers + torch.arange(number, number + count, device=x.device) * (height * width)
    settle = _settle_row if are_few(count) else _settle_pixels
    for row in range(height):
        walk.begin_row(row)
        settle(walk, rule, found[row], numbers[row], row)
    return found.permute(2, 3, 0, 1).contiguous()


def _settle_pixels(walk: Walk, rule: Rule, found: Tensor, numbers: Tensor, row: int) -> None:
    """Find the levels ``found`` (W, N, C) of a row, column by column."""
    channels = found.shape[-1]
    for column, (levels, pixels) in enumerate(zip(found, numbers, strict=True)):
        levels.copy_(rule.choose_pixels(walk.stretch(row, column, column + 1), pixels, channels))
        walk.know(row, column, levels[None])


def _settle_row(walk: Walk, rule: Rule, found: Tensor, numbers: Tensor, row: int) -> None:
    """The same, by iteration over all columns that are not final."""
    width, count, channels = found.shape
    first = 0
    walk.know(row, first, found)
    while first < width:
        start = first - first % ALIGNED
        params = walk.stretch(row, start, width)[(first - start) * count :]
        levels = rule.choose_pixels(params, numbers[first:].flatten(), channels).view(-1, count, channels)
        changed = (levels != found[first:]).flatten(1).any(dim=1).nonzero()
        found[first:] = levels
        walk.know(row, first, levels)
        first = first + int(changed[0]) + 1 if len(changed) else width
