"""Generators, which map latent vectors to images: what defences ask of one, and a variational autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from art_pixeldefend.models.base import ImageModel
from art_pixeldefend.validation import check_count, check_image_shape

EVALUATION_BATCH = 1000
LOG_VARIANCES = (-12.0, 4.0)  # of latents: wider than useful ones, and no exponential overflows


class Generator(ImageModel):
    """Base class of generators: the images G(z) of latent vectors z, whose prior is N(0, I).

    A subclass sets ``image_shape`` and ``latent_size`` and implements :meth:`forward`. A generator with another prior
    maps standard normal numbers to it first. To be saved, it is also what :class:`ImageModel` asks for.

    Attributes:
        image_shape: (C, H, W).
        latent_size: L, the number of latent variables.

    Example:
        >>> import torch
        >>> from art_pixeldefend.models.generator import Generator
        >>> class Wrapped(Generator):  # a trained GAN with uniform latents and outputs in [-1, 1]
        ...     def __init__(self, network):
        ...         super().__init__()
        ...         self.network, self.image_shape, self.latent_size = network, (1, 4, 4), 3
        ...
        ...     def forward(self, z):
        ...         return (self.network(torch.special.ndtr(z)).unflatten(1, self.image_shape) + 1) / 2
        >>> generator = Wrapped(torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh()))
        >>> generator.sample(5).shape
        torch.Size([5, 1, 4, 4])
    """

    kind: ClassVar[str] = "generator"
    latent_size: int

    def forward(self, z: Tensor) -> Tensor:
        """Return the images (N, C, H, W), with 0 for black and 1 for white, of latents (N, L); differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must implement forward")

    def encode(self, x: Tensor) -> Tensor:
        """Return a guess of the latents (N, L) of images (N, C, H, W) in [0, 1]; differentiable.

        Raises:
            NotImplementedError: if the generator has no encoder.
        """
        raise NotImplementedError(f"{type(self).__name__} has no encoder")

    @property
    def encodes(self) -> bool:
        """Whether the generator has an encoder."""
        return type(self).encode is not Generator.encode

    @torch.no_grad()
    def sample(self, count: int, *, seed: int = 0) -> Tensor:
        """Draw images of the prior: levels (count, C, H, W), uint8.

        Raises:
            ValueError: if ``count`` is negative.
        """
        shape = (check_count("count", count, 0), self.latent_size)
        z = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(self.device, self.dtype)
        with self.evaluating():
            return (self(z) * 255).round().clamp(0, 255).to(torch.uint8)


class VAE(Generator):
    """A variational autoencoder of fully connected layers (Kingma and Welling 2014, arXiv:1312.6114).

    The decoder gives every sub-pixel a normal density around its output with one variance for all, the best for each
    batch (Rybkin, Daniilidis and Levine 2021, arXiv:2006.13202): no weight between the two parts of the loss is left to
    choose. Fully connected layers make a decoder that is inverted in few operations, for small images.

    Args:
        image_shape: (C, H, W).
        latent_size: number of latent variables.
        hidden: widths of the decoder's hidden layers, from the latents on; the encoder has the same, in reverse.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> import torch
        >>> from art_pixeldefend.models.generator import VAE
        >>> model = VAE((1, 8, 8), latent_size=4, hidden=(16,))
        >>> z = model.encode(torch.rand(5, 1, 8, 8))
        >>> z.shape, model(z).shape
        (torch.Size([5, 4]), torch.Size([5, 1, 8, 8]))
    """

    kind = "vae"

    def __init__(
        self, image_shape: tuple[int, int, int], latent_size: int = 32, hidden: Sequence[int] = (512, 512)
    ) -> None:
        super().__init__()
        self.image_shape = check_image_shape(image_shape)
        self.latent_size = check_count("latent_size", latent_size)
        try:
            self.hidden = tuple(check_count("hidden", width) for width in hidden)
        except TypeError:
            raise ValueError(f"hidden must be a sequence of positive integers, got {hidden!r}") from None
        pixels = int(np.prod(self.image_shape))
        self.encoder = _layers(pixels, *reversed(self.hidden), 2 * self.latent_size)
        self.decoder = _layers(self.latent_size, *self.hidden, pixels)

    def forward(self, z: Tensor) -> Tensor:
        """Return the images (N, C, H, W) in [0, 1] of latents (N, L)."""
        return self.decoder(z).sigmoid().unflatten(1, self.image_shape)

    def encode(self, x: Tensor) -> Tensor:
        """Return the means (N, L) of the approximate posteriors of images (N, C, H, W) in [0, 1]."""
        return self.posterior(x)[0]

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and log variances, (N, L) each, of the approximate posteriors of images in [0, 1]."""
        mean, log_variance = self.encoder(x.flatten(1) - 0.5).chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCES)

    def loss(self, x: Tensor) -> Tensor:
        """Return the negative evidence lower bound of levels (N, C, H, W), in nats per sub-pixel up to a constant."""
        target = x.float() / 255
        mean, log_variance = (value.float() for value in self.posterior(target))
        images = self(mean + (log_variance / 2).exp() * torch.randn_like(mean)).float()
        error = (images - target).square().mean().clamp_min(1e-6)
        return error.log() / 2 + _divergence(mean, log_variance).mean() / target[0].numel()

    @torch.no_grad()
    def evaluate(self, x: Tensor | np.ndarray) -> dict[str, float]:
        """Return means over levels ``x`` (N, C, H, W).

        They are ``rmse``, the root mean square error of each image that is encoded and decoded, in the [0, 1] range;
        and ``kl``, the Kullback-Leibler divergence of its posterior from the prior in nats.
        """
        errors, divergences = [], []
        for some in self.as_levels(x).split(EVALUATION_BATCH):
            target = some.to(self.dtype) / 255
            mean, log_variance = self.posterior(target)
            errors.append((self(mean) - target).square().mean((1, 2, 3)).sqrt())
            divergences.append(_divergence(mean, log_variance))
        return {"rmse": torch.cat(errors).mean().item(), "kl": torch.cat(divergences).mean().item()}


def _divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, I)) of each row, in nats."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2


def _layers(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.SiLU()]
    return nn.Sequential(*layers[:-1])
