"""An independent check that purified images are the output of PixelDefend's Algorithm 1."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp, check_pixel_cnn, mixture
from art_pixeldefend.validation import check_eps

IMAGE_CHUNK = 16  # images per forward pass
LEVEL_CHUNK = 32  # levels whose probabilities are computed at a time
TOLERANCE = 1e-4  # nats; rounding in a float32 network decides between levels whose log-probabilities differ by less


class Certificate(NamedTuple):
    """Result of :func:`certify`, one entry per image: tensors (N,).

    Attributes:
        exact: True if every sub-pixel is within ``eps`` of the input and as likely as the most likely level of that
            range, up to :data:`TOLERANCE`.
        ties: number of sub-pixels that differ from the most likely level, but by less than :data:`TOLERANCE`.
        gap: largest difference over the sub-pixels between the log-probability of the most likely level and that of the
            level chosen, in nats; infinite for an image with a sub-pixel out of range.
    """

    exact: Tensor
    ties: Tensor
    gap: Tensor


@torch.no_grad()
def certify(pixel_cnn: PixelCNNpp, x: Tensor | np.ndarray, x_purified: Tensor | np.ndarray, eps: int) -> Certificate:
    """Check that every level is the argmax of its conditional within ``eps`` of the input (PixelDefend, Algorithm 1).

    If it holds for every sub-pixel, the image is the greedy solution, by induction over the pixels: the first pixel's
    conditional depends on nothing, and each further one on pixels that have been checked.

    The check shares no code with the engines beyond the network and the mixture's log-probability: it takes one plain
    forward pass, evaluates :func:`.mixture.log_prob` at every level of the range, and compares.

    Args:
        pixel_cnn: the density model.
        x: the input, levels (N, C, H, W).
        x_purified: the purified input, levels (N, C, H, W).
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
        chunks = zip(x.split(IMAGE_CHUNK), x_purified.split(IMAGE_CHUNK), strict=True)
        gaps = torch.cat([_gaps(pixel_cnn, *chunk, eps).flatten(1) for chunk in chunks])
    exact = (gaps.abs() < TOLERANCE).all(dim=1)  # False for NaN
    ties = ((gaps > 0) & (gaps < TOLERANCE)).sum(dim=1)
    return Certificate(exact, ties, gaps.amax(dim=1))


def _gaps(pixel_cnn: PixelCNNpp, x: Tensor, purified: Tensor, eps: int) -> Tensor:
    """max over levels z with |z - x| <= eps of log p(z), minus log p(the level chosen), in nats: (N, H, W, C)."""
    params = pixel_cnn(purified).movedim(1, -1).double()
    x, chosen = x.movedim(1, -1).double(), purified.movedim(1, -1).double()
    low, high = (x - eps).clamp_min(0), (x + eps).clamp_max(mixture.LEVELS - 1)
    offsets = torch.arange(min(2 * eps + 1, mixture.LEVELS), dtype=torch.float64, device=x.device)
    gaps = torch.empty_like(chosen)
    for k in range(chosen.shape[-1]):
        parts = mixture.components(params, chosen, k)
        best = torch.full_like(chosen[..., k], -torch.inf)
        for chunk in offsets.split(LEVEL_CHUNK):
            z = torch.minimum(low[..., k, None] + chunk, high[..., k, None])
            best = torch.maximum(best, mixture.log_prob(parts.for_each_level(), z).amax(dim=-1))
        gaps[..., k] = best - mixture.log_prob(parts, chosen[..., k])
    return gaps.where((chosen >= low) & (chosen <= high), torch.inf)
