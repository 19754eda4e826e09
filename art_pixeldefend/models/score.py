"""Score models: noise-conditional denoisers, their training loss, and the reverse diffusion that samples with them.

A score model estimates the score of the images x + n, n ~ N(0, sigma^2 I), from a denoiser D (Tweedie's formula):

    score(x, sigma) = grad log p_sigma(x) = (D(x, sigma) - x) / sigma^2

All images are floats with 0 for black and 1 for white; sigma is in the same unit, and noisy images are not clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from art_pixeldefend.models.base import ImageModel
from art_pixeldefend.validation import check_count, check_image_shape, check_number

FREQUENCIES = 16  # of the Fourier features of the noise level
SAMPLING_STEPS = 50
EVALUATED = (0.1, 0.25, 0.5)  # noise levels
EVALUATION_BATCH = 200
Noise = Callable[[], Tensor]  # a fresh standard normal tensor of the images' shape at every call


class ScoreModel(ImageModel):
    """Denoise images with a known noise level by a small U-Net (Karras et al. 2022, arXiv:2206.00364, Table 1).

    With m and s the mean and the standard deviation of the training images' pixels and F the network,

        D(x, sigma) = m + (s / t)^2 (x - m) + (sigma s / t) F((x - m) / t, sigma),  t^2 = sigma^2 + s^2,

    so that an untrained model, whose F is zero, is the best linear denoiser of independent pixels. The network has no
    dropout and no normalisation layers: training and evaluation compute the same function.

    Args:
        image_shape: (C, H, W); any C, H and W.
        channels: feature maps at each resolution; the first resolution is that of the images divided by ``patch``,
            each further one half of the one before.
        blocks: residual blocks at each resolution; all but the last have as many on the way up as on the way down.
        embedding: features of the noise level.
        patch: the network sees ``patch`` x ``patch`` pixels as one.
        mean: m.
        deviation: s.
        sigma_range: (smallest, largest) noise level in training. A smaller sigma is denoised as well, a larger one is
            refused.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> import torch
        >>> from art_pixeldefend.models.score import ScoreModel
        >>> model = ScoreModel((1, 8, 8), channels=(8, 16), blocks=(1, 1))
        >>> x = torch.rand(5, 1, 8, 8)
        >>> model.denoise(x, 0.25).shape
        torch.Size([5, 1, 8, 8])
        >>> torch.equal(model.denoise(x, 0.0), x)
        True
    """

    kind = "score"

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        channels: Sequence[int] = (32, 96, 128),
        blocks: Sequence[int] = (1, 1, 2),
        embedding: int = 64,
        patch: int = 2,
        mean: float = 0.5,
        deviation: float = 0.25,
        sigma_range: tuple[float, float] = (0.01, 1.0),
    ) -> None:
        super().__init__()
        self.image_shape = check_image_shape(image_shape)
        self.channels, self.blocks = (
            _counts(name, value) for name, value in (("channels", channels), ("blocks", blocks))
        )
        if len(self.channels) != len(self.blocks):
            raise ValueError(
                f"blocks must have one entry for each of the {len(self.channels)} channels, got {blocks!r}"
            )
        self.embedding = check_count("embedding", embedding)
        self.patch = check_count("patch", patch)
        self.mean = check_number("mean", mean, -math.inf)
        self.deviation = check_number("deviation", deviation, 1e-6)
        self.sigma_range = _range(sigma_range)
        self.network = _UNet(self.image_shape[0], self.channels, self.blocks, self.embedding, self.patch)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a seventh faster on CPUs

    def initialise(self, x: Tensor | np.ndarray) -> None:
        """Set ``mean`` and ``deviation`` to those of the pixels of levels ``x`` (N, C, H, W).

        Raises:
            ValueError: if ``x`` is empty, or not a batch of levels of the model's image shape.
        """
        pixels = self.as_levels(x).double() / 255
        if not len(pixels):
            raise ValueError("x must hold at least one image to initialise from")
        self.mean, self.deviation = pixels.mean().item(), max(pixels.std(correction=0).item(), 1e-3)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """F: the network's output for noisy images ``x`` (N, C, H, W) and their noise levels (N,)."""
        scale = (sigma.square() + self.deviation**2).rsqrt()[:, None, None, None]
        return self.network((x - self.mean) * scale, sigma.clamp_min(self.sigma_range[0]).log() / 4).to(x.dtype)

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Estimate the clean images E[x | x + n] of noisy images; differentiable in ``x``.

        Args:
            x: noisy images (N, C, H, W), not clipped.
            sigma: the standard deviation of their noise, one for all or one for each image (N,). Zero returns ``x``.

        Returns:
            Images of the shape and dtype of ``x``; values may lie slightly outside [0, 1].

        Raises:
            ValueError: naming ``x`` or ``sigma``: images of another shape, or a level out of range.
        """
        output, noisy, sigma = self._evaluate(x, sigma, 0.0)
        total = sigma.square() + self.deviation**2
        linear = self.mean + self.deviation**2 / total * (noisy - self.mean)
        denoised = linear + sigma * self.deviation * total.rsqrt() * output
        return torch.where(sigma > 0, denoised, noisy).to(x.dtype)

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """The gradient of the log density of noisy images, (denoise(x, sigma) - x) / sigma^2; differentiable in ``x``.

        Args:
            x: noisy images (N, C, H, W), not clipped.
            sigma: the standard deviation of their noise, one for all or one for each image (N,); positive.

        Returns:
            A tensor of the shape and dtype of ``x``, computed without the cancellation of the formula.

        Raises:
            ValueError: naming ``x`` or ``sigma``: images of another shape, or a level out of range.
        """
        output, noisy, sigma = self._evaluate(x, sigma, 1e-6)
        total = sigma.square() + self.deviation**2
        score = (self.mean - noisy) / total + self.deviation / sigma * total.rsqrt() * output
        return score.to(x.dtype)

    def _evaluate(self, x: Tensor, sigma: float | Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
        """F, the images in the model's dtype, the noise levels (N, 1, 1, 1)."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or tuple(x.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a floating-point tensor (N, {expected}), got {got}")
        levels = self._levels(sigma, least, x)
        noisy = x.to(self.device, self.dtype)
        with self.evaluating(), torch.autocast(self.device.type, enabled=False):
            output = self(noisy, levels)
        return output, noisy, levels[:, None, None, None]

    def _levels(self, sigma: float | Tensor, least: float, x: Tensor) -> Tensor:
        most = self.sigma_range[1] * (1 + 1e-6)
        levels = torch.as_tensor(sigma, dtype=self.dtype, device=self.device).detach()
        if levels.numel() and not (levels.min() >= least and levels.max() <= most):  # also for NaN
            raise ValueError(
                f"sigma must be between {least:g} and {self.sigma_range[1]:g}, the model's largest, got {sigma}"
            )
        if levels.shape not in ((), (len(x),)):
            raise ValueError(
                f"sigma must be one number, or one for each of {len(x)} images, got shape {tuple(levels.shape)}"
            )
        return levels.expand(len(x))

    def loss(self, batch: Tensor) -> Tensor:
        """The training loss of levels (N, C, H, W): :class:`DenoisingLoss` with its default noise levels."""
        return DenoisingLoss()(self, batch)

    @torch.no_grad()
    def evaluate(self, x: Tensor | np.ndarray) -> dict[str, float]:
        """The root mean square error of denoised images at several noise levels, averaged over levels ``x``.

        The noise is the same at every call.
        """
        clean = self.as_levels(x).to(self.dtype) / 255
        errors: dict[str, float] = {}
        for sigma in EVALUATED:
            generator = torch.Generator().manual_seed(0)
            of_images = []
            for some in clean.split(EVALUATION_BATCH):
                noise = torch.randn(some.shape, generator=generator, device="cpu").to(some)
                error = self.denoise(some + sigma * noise, sigma) - some
                of_images.append(error.square().mean((1, 2, 3)).sqrt())
            errors[f"rmse_{sigma:g}"] = torch.cat(of_images).mean().item()
        return errors

    @torch.no_grad()
    def sample(self, count: int, *, seed: int = 0, steps: int = SAMPLING_STEPS) -> Tensor:
        """Draw images by reverse diffusion from the largest noise level: levels (count, C, H, W), uint8.

        Raises:
            ValueError: if ``count`` is negative, or ``steps`` is not positive.
        """
        generator = torch.Generator().manual_seed(seed)
        shape = (check_count("count", count, 0), *self.image_shape)

        def noise() -> Tensor:
            return torch.randn(shape, generator=generator, device="cpu").to(self.device, self.dtype)

        sigma = self.sigma_range[1]
        x = self.mean + math.hypot(sigma, self.deviation) * noise()
        x = reverse_diffusion(self.denoise, x, noise_levels(sigma, steps, self.sigma_range[0]), 1.0, noise)
        return (x * 255).round().clamp(0, 255).to(torch.uint8)


class DenoisingLoss:
    """The loss of denoising score matching, weighted so that every noise level counts alike (Karras et al. 2022).

        E (|D(x + n, sigma) - x|^2 / d) (sigma^2 + s^2) / (sigma s)^2,  n ~ N(0, sigma^2 I),

    where d is the number of sub-pixels and s the model's ``deviation``. ln sigma is normal, truncated to the model's
    ``sigma_range``. An untrained model has a loss of 1 on the images that :meth:`ScoreModel.initialise` got.

    Args:
        mean, deviation: of ln sigma before the truncation.
    """

    def __init__(self, mean: float = -1.5, deviation: float = 0.9) -> None:
        self.mean, self.deviation = mean, deviation

    def __call__(self, model: ScoreModel, batch: Tensor) -> Tensor:
        """The mean loss of levels (N, C, H, W), noise and noise levels drawn from torch's generator."""
        x = batch.float() / 255 - model.mean
        sigma = self.sample_sigma(len(x), model.sigma_range, x.device)
        noise = torch.randn_like(x)
        ratio = (sigma / model.deviation)[:, None, None, None]
        # With the weight above this is the squared error of F: its target, from D = x solved for F.
        target = (ratio * x - model.deviation * noise) * (sigma.square() + model.deviation**2).rsqrt()[
            :, None, None, None
        ]
        noisy = x + sigma[:, None, None, None] * noise + model.mean
        return (model(noisy, sigma).float() - target).square().mean()

    def sample_sigma(self, count: int, sigma_range: tuple[float, float], device: torch.device) -> Tensor:
        """Noise levels (count,) of the truncated log-normal distribution, by its inverse distribution function."""
        low, high = (
            torch.special.ndtr(torch.tensor((math.log(end) - self.mean) / self.deviation, dtype=torch.float64)).item()
            for end in sigma_range
        )
        uniform = torch.rand(count, device=device) * (high - low) + low
        return (torch.special.ndtri(uniform) * self.deviation + self.mean).exp().clamp(*sigma_range)


# Reverse diffusion


def noise_levels(sigma: float, steps: int, last: float | None = None) -> tuple[float, ...]:
    """Noise levels from ``sigma`` down to 0 in ``steps`` steps: linear, or geometric to ``last`` and then 0.

    Raises:
        ValueError: if ``steps`` is not a positive integer.
    """
    steps = check_count("steps", steps)
    if last is None or steps == 1:
        return (*(sigma * (1 - i / steps) for i in range(steps)), 0.0)
    return (*(sigma * (last / sigma) ** (i / (steps - 1)) for i in range(steps)), 0.0)


def reverse_diffusion(
    denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: Sequence[float], eta: float, noise: Noise
) -> Tensor:
    """Follow the reverse diffusion of images with noise ``sigmas[0]`` through the given levels.

    From a level s to the next, t, a step keeps the denoised image D and part of the noise and adds fresh noise:

        x <- D(x, s) + (down / s) (x - D(x, s)) + up n,  up = eta t sqrt(1 - (t / s)^2),  down^2 + up^2 = t^2

    Args:
        denoise: the denoiser, a function of images and a noise level.
        x: images (N, C, H, W) with noise of standard deviation ``sigmas[0]``, not clipped.
        sigmas: decreasing noise levels, usually ending with 0.
        eta: 0 is deterministic (DDIM, the probability-flow ODE by Euler's method), 1 ancestral sampling (DDPM).
        noise: draws standard normal noise of the shape of ``x``; called once for each step that adds noise.

    Returns:
        Images of noise ``sigmas[-1]``, not clipped.
    """
    for now, after in pairwise(sigmas):
        denoised = denoise(x, now)
        up = eta * after * math.sqrt(max(0.0, 1 - (after / now) ** 2))
        down = math.sqrt(max(0.0, after**2 - up**2))
        x = denoised + (down / now) * (x - denoised)
        if up:
            x = x + up * noise()
    return x


# The network


class _UNet(nn.Module):
    """Residual blocks at several resolutions, with additive skip connections."""

    frequencies: Tensor

    def __init__(
        self, image_channels: int, channels: Sequence[int], blocks: Sequence[int], embedding: int, patch: int
    ) -> None:
        super().__init__()
        self.patch = patch
        frequencies = torch.exp(torch.linspace(0.0, 4.0, FREQUENCIES))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.embed = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )

        def stage(width: int, count: int) -> nn.ModuleList:
            return nn.ModuleList(_Block(width, embedding) for _ in range(count))

        pairs = list(pairwise(channels))
        self.stem = _conv(image_channels * patch**2, channels[0])
        self.down = nn.ModuleList(stage(*size) for size in zip(channels[:-1], blocks[:-1], strict=True))
        self.shrink = nn.ModuleList(_conv(wide, narrow, stride=2) for wide, narrow in pairs)
        self.middle = stage(channels[-1], blocks[-1])
        self.grow = nn.ModuleList(nn.Conv2d(narrow, wide, 1) for wide, narrow in pairs)
        self.up = nn.ModuleList(stage(*size) for size in zip(channels[:-1], blocks[:-1], strict=True))
        self.head = _zero(_conv(channels[0], image_channels * patch**2))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """(N, C, H, W) and a number (N,) that tells the noise level, to (N, C, H, W)."""
        height, width = x.shape[-2:]
        angles = level[:, None] * self.frequencies
        embedding = self.embed(torch.cat((angles.sin(), angles.cos()), dim=1))
        x = F.pad(x, (0, -width % self.patch, 0, -height % self.patch), mode="replicate")
        x = F.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        skips = []
        for stage, shrink in zip(self.down, self.shrink, strict=True):
            x = _through(stage, x, embedding)
            skips.append(x)
            x = shrink(x)
        x = _through(self.middle, x, embedding)
        for stage, grow, skip in reversed(list(zip(self.up, self.grow, skips, strict=True))):
            x = skip + F.interpolate(grow(x), size=skip.shape[-2:])
            x = _through(stage, x, embedding)
        x = F.pixel_shuffle(self.head(F.silu(x)), self.patch)
        return x[..., :height, :width]


class _Block(nn.Module):
    """A residual block whose features are scaled and shifted by the noise level; the identity before training."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels)
        self.conv2 = _zero(_conv(channels, channels))
        self.modulate = _zero(nn.Linear(embedding, 2 * channels))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding)[..., None, None].chunk(2, dim=1)
        return x + self.conv2(F.silu(torch.addcmul(shift, self.conv1(F.silu(x)), 1 + scale)))


def _through(stage: Any, x: Tensor, embedding: Tensor) -> Tensor:
    for block in stage:
        x = block(x, embedding)
    return x


def _conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1)


def _zero(layer: Any) -> Any:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _counts(name: str, values: Any) -> tuple[int, ...]:
    try:
        counts = tuple(check_count(name, value) for value in values)
    except TypeError:
        counts = ()
    if not counts:
        raise ValueError(f"{name} must be a sequence of positive integers, got {values!r}")
    return counts


def _range(value: Any) -> tuple[float, float]:
    try:
        low, high = (check_number("sigma_range", end) for end in value)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 < low < high < math.inf:
        raise ValueError(f"sigma_range must be two positive numbers, the smaller first, got {value!r}")
    return low, high
