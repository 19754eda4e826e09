"""Proof, in one plain pass, that an image is what Algorithm 1 gives."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp, check_pixel_cnn, mixture
from art_pixeldefend.models.pixelcnnpp.decoders.rules import Greedy
from art_pixeldefend.validation import check_eps

CHUNK = 16  # images a pass
TIE = 1e-4  # nats: nearer than that, rounding in the network decides which level is the better one


class Certificate(NamedTuple):
    """What a plain pass says of purified images, tensors (N,).

    Attributes:
        exact: every sub-pixel is in the feasible range and the most likely level of it, ties forgiven.
        ties: sub-pixels that are not the most likely level, but less likely by under :data:`TIE` nats only.
        gap: how much less likely than the best level the worst sub-pixel is, in nats; infinite outside the range.
    """

    exact: Tensor
    ties: Tensor
    gap: Tensor


@torch.no_grad()
def certify(pixel_cnn: PixelCNNpp, x: Tensor | np.ndarray, x_purified: Tensor | np.ndarray, eps: int) -> Certificate:
    """Is every level the argmax of its own conditional within ``eps`` of the input (PixelDefend, Algorithm 1)?

    An image of which that is true is the greedy solution: its first pixel depends on nothing, and each pixel after it
    on pixels that are right.

    Args:
        pixel_cnn: the density model.
        x: the input, levels (N, C, H, W).
        x_purified: what was made of it, levels (N, C, H, W).
        eps: radius in levels, 0..255.

    Raises:
        ValueError: naming the argument that is not as described.
    """
    check_pixel_cnn(pixel_cnn)
    eps = check_eps("eps", eps)
    x, x_purified = pixel_cnn.as_levels(x), pixel_cnn.as_levels(x_purified, "x_purified")
    if len(x) != len(x_purified):
        raise ValueError(f"x_purified must hold as many images as x, {len(x)}, got {len(x_purified)}")
    with pixel_cnn.evaluating():
        pieces = zip(x.split(CHUNK), x_purified.split(CHUNK), strict=True)
        gaps = torch.cat([_gaps(pixel_cnn, *piece, eps).flatten(1) for piece in pieces])
    ties = ((gaps > 0) & (gaps < TIE)).sum(dim=1)
    return Certificate((gaps < TIE).all(dim=1), ties, gaps.amax(dim=1))


def _gaps(pixel_cnn: PixelCNNpp, x: Tensor, purified: Tensor, eps: int) -> Tensor:
    """log p(best feasible level) - log p(the level chosen), (N, H, W, C), in nats."""
    params = pixel_cnn(purified).movedim(1, -1).flatten(0, 2).double()
    levels = purified.movedim(1, -1).flatten(0, 2).double()
    rule = Greedy(x, eps)
    pixels = torch.arange(len(params), device=params.device)
    gaps = torch.empty_like(levels)
    for k in range(levels.shape[1]):
        parts = mixture.components(params, levels, k)
        best = mixture.log_prob(parts, rule.choose(parts, pixels, k).double())
        gaps[:, k] = best - mixture.log_prob(parts, levels[:, k])
    feasible = (levels >= rule.low.t()) & (levels <= rule.high.t())
    return gaps.where(feasible, torch.inf).view(x.movedim(1, -1).shape)
