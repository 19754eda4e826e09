"""Which level a sub-pixel takes, given its mixture: greedily within a range, or at random.

A rule is a function of a pixel's parameters and its position, nothing else, so every engine that gives each pixel the
parameters of the finished pixels before it finds the same image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import mixture
from art_pixeldefend.models.pixelcnnpp.mixture import LEVELS, Components

WEIGHED = 1 << 21  # masses at a time where levels are weighed: 16 MiB, and up to twice that with what is cut off


class Rule(ABC):
    """Chooses levels for pixels that are named by their position in the flattened batch: (n H + i) W + j."""

    @abstractmethod
    def choose(self, parts: Components, pixels: Tensor, channel: int) -> Tensor:
        """Levels (M,) of one channel of the ``pixels`` (M,), whose mixtures are ``parts`` (M, K)."""

    def choose_pixels(self, params: Tensor, pixels: Tensor, channels: int) -> Tensor:
        """Levels (M, C), channel after channel, of the ``pixels`` (M,) with network outputs ``params`` (M, P)."""
        if params.dtype in (torch.bfloat16, torch.float16):  # a network of reduced precision; the mixture is not
            params = params.float()
        x = params.new_zeros(len(params), channels)
        for k in range(channels):
            x[:, k] = self.choose(mixture.components(params, x, k), pixels, k).to(x.dtype)
        return x.to(torch.uint8)


class Greedy(Rule):
    """The most likely level within ``eps`` of the input (PixelDefend, Algorithm 1, lines 5 to 8).

    Args:
        x: the input, levels (N, C, H, W).
        eps: radius in levels.
    """

    def __init__(self, x: Tensor, eps: int) -> None:
        flat = x.movedim(1, 0).flatten(1).long()  # (C, N H W)
        self.low, self.high = (flat - eps).clamp_min(0), (flat + eps).clamp_max(LEVELS - 1)
        self.window = min(2 * eps + 1, LEVELS)

    def choose(self, parts: Components, pixels: Tensor, channel: int) -> Tensor:
        """The argmax over the range, a bounded number of pixels at a time."""
        low, high = self.low[channel][pixels], self.high[channel][pixels]
        piece = max(1, WEIGHED // (self.window * parts.means.shape[-1]))
        if len(low) <= piece:
            return mixture.best_level(parts, low, high)
        pieces = zip(*(part.split(piece) for part in (*parts, low, high)), strict=True)
        return torch.cat([mixture.best_level(Components(*parts), low, high) for *parts, low, high in pieces])


class Ancestral(Rule):
    """A draw from the mixture: a component by the Gumbel-max trick, then the inverse of its distribution function.

    All noise is drawn beforehand, which makes the draw a function of the parameters (Wiggers and Hoogeboom 2020,
    arXiv:2002.09928).

    Args:
        count: images N.
        image_shape: (C, H, W).
        mixtures: components K.
        generator: of the noise.
    """

    def __init__(
        self, count: int, image_shape: tuple[int, int, int], mixtures: int, generator: torch.Generator
    ) -> None:
        channels, height, width = image_shape
        size = (count * height * width, channels, mixtures + 1)
        noise = torch.rand(size, generator=generator, dtype=torch.float64, device=generator.device)
        noise = noise.clamp(1e-12, 1 - 1e-12)
        self.gumbel, self.logistic = -torch.log(-torch.log(noise[..., 1:])), torch.logit(noise[..., 0])

    def choose(self, parts: Components, pixels: Tensor, channel: int) -> Tensor:
        """The draw that the noise of these sub-pixels makes of their mixtures."""
        device = pixels.device
        gumbel, logistic = (noise[pixels.cpu(), channel].to(device) for noise in (self.gumbel, self.logistic))
        component = (parts.log_weights.double() + gumbel).argmax(dim=-1, keepdim=True)
        mean = parts.means.double().gather(-1, component).squeeze(-1)
        inverse_scale = parts.inverse_scales.double().gather(-1, component).squeeze(-1)
        return torch.round(mean + logistic / inverse_scale).clamp(0, LEVELS - 1)
