"""Rules that choose a sub-pixel's level from its conditional distribution: the most likely one in a range, or a draw.

A rule is a function of a pixel's mixture and its position only. Every engine that computes each pixel's mixture from
the final levels of the pixels before it therefore finds the same image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import mixture
from art_pixeldefend.models.pixelcnnpp.mixture import LEVELS, Components

MASSES_AT_A_TIME = 1 << 21  # float64 numbers, 16 MiB


def not_finite() -> ValueError:
    """The error for a model that gives NaN or infinity."""
    return ValueError("pixel_cnn must give finite outputs, got NaN or infinity; are its weights finite?")


def check_finite(outputs: Tensor) -> Tensor:
    """``outputs`` of the network, if they are finite. (Any comparison with NaN is false: it would choose some level.)

    Raises:
        ValueError: naming ``pixel_cnn``.
    """
    if not outputs.isfinite().all():
        raise not_finite()
    return outputs


class Rule(ABC):
    """Chooses levels of pixels, which are numbered by their position in the flattened batch: (n H + i) W + j."""

    @abstractmethod
    def choose(self, parts: Components, pixels: Tensor, channel: int) -> Tensor:
        """Levels (M,) of one channel of the pixels numbered ``pixels`` (M,), whose mixtures are ``parts`` (M, K)."""

    def choose_pixels(self, params: Tensor, pixels: Tensor, channels: int) -> Tensor:
        """Levels (M, C), channel by channel, of the pixels numbered ``pixels`` (M,) with network outputs (M, P).

        Raises:
            ValueError: if the outputs are not finite.
        """
        check_finite(params)
        if params.dtype in (torch.bfloat16, torch.float16):  # only the network is computed in reduced precision
            params = params.float()
        x = params.new_zeros(len(params), channels)
        for k in range(channels):
            x[:, k] = self.choose(mixture.components(params, x, k), pixels, k).to(x.dtype)
        return x.to(torch.uint8)


class Greedy(Rule):
    """Chooses the most likely level within ``eps`` of the input (PixelDefend, Algorithm 1, lines 5 to 8).

    Args:
        x: the input, levels (N, C, H, W).
        eps: radius in levels.
    """

    def __init__(self, x: Tensor, eps: int) -> None:
        flat = x.movedim(1, 0).flatten(1).long()  # (C, N H W)
        self.low, self.high = (flat - eps).clamp_min(0), (flat + eps).clamp_max(LEVELS - 1)
        self.window = min(2 * eps + 1, LEVELS)

    def choose(self, parts: Components, pixels: Tensor, channel: int) -> Tensor:
        """The argmax over the range."""
        low, high = self.low[channel][pixels], self.high[channel][pixels]
        piece = max(1, MASSES_AT_A_TIME // (self.window * parts.means.shape[-1]))
        if len(low) <= piece:
            return mixture.best_level(parts, low, high)
        pieces = zip(*(part.split(piece) for part in (*parts, low, high)), strict=True)
        return torch.cat([mixture.best_level(Components(*parts), low, high) for *parts, low, high in pieces])


class Ancestral(Rule):
    """Draws a level: a component by the Gumbel-max trick, then a value by the inverse of its distribution function.

    All noise is drawn in the constructor, which makes each draw a function of the mixture (Wiggers and Hoogeboom 2020,
    arXiv:2002.09928).

    Args:
        count: images N.
        image_shape: (C, H, W).
        mixtures: components K.
        generator: source of the noise.
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
        """Draws for these sub-pixels, with their own noise."""
        device = pixels.device
        gumbel, logistic = (noise[pixels.cpu(), channel].to(device) for noise in (self.gumbel, self.logistic))
        component = (parts.log_weights.double() + gumbel).argmax(dim=-1, keepdim=True)
        mean = parts.means.double().gather(-1, component).squeeze(-1)
        inverse_scale = parts.inverse_scales.double().gather(-1, component).squeeze(-1)
        return torch.round(mean + logistic / inverse_scale).clamp(0, LEVELS - 1)
