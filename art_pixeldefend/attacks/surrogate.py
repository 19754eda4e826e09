"""Learned differentiable stand-ins for purifiers, whose derivatives attacks use."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from art_pixeldefend.levels import Images, as_tensor
from art_pixeldefend.precision import full_float32
from art_pixeldefend.purifiers.base import Purifier
from art_pixeldefend.validation import check_count, check_number


class Surrogate(nn.Module):
    """A small convolutional network from images to purified images, both in [0, 1].

        x -> x + f(x),  f of 3 x 3 convolutions, in which every second one is dilated

    Pass it as ``gradient`` of a purifier or of :class:`~art_pixeldefend.attacks.AdaptivePGD`: images are purified as
    before, and their gradients are those of the network. :func:`fit_surrogate` trains it.

    Args:
        channels: of the images.
        width: feature maps.
        layers: convolutions, two at least.

    Example:
        >>> Surrogate(channels=1)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, channels: int, width: int = 24, layers: int = 5) -> None:
        super().__init__()
        sizes = [channels, *[width] * (layers - 1), channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1 + i % 2, dilation=1 + i % 2) for i, (a, b) in enumerate(pairwise(sizes))
        )
        nn.init.zeros_(self.convolutions[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.convolutions[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Approximately purified images (N, C, H, W), in the dtype of ``x``."""
        change = x.to(self.convolutions[0].weight.dtype) - 0.5  # type: ignore[arg-type, union-attr]
        for convolution in self.convolutions[:-1]:
            change = F.silu(convolution(change))
        return x + self.convolutions[-1](change).to(x.dtype)


def fit_surrogate(
    purifier: Purifier,
    x: np.ndarray,
    *,
    eps: float = 32 / 255,
    copies: int = 2,
    steps: int = 400,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    width: int = 24,
    layers: int = 5,
    seed: int = 0,
    verbose: bool = False,
) -> Surrogate:
    """Train a :class:`Surrogate` on pairs of perturbed images and what a purifier makes of them.

    Perturbations are blocks of constant sign, of 1 to 4 pixels a side, with a radius uniform in [0, eps] for each
    image. Of a purifier that draws random numbers it learns the mean.

    Args:
        purifier: any; its ``clip_values`` are those of ``x``.
        x: images (N, C, H, W) that the attack is not measured on, a thousand for Fashion-MNIST.
        eps: largest radius of perturbations, in the [0, 1] range.
        copies: perturbed copies of each image.
        steps: of Adam, whose learning rate falls to 0 by a half cosine.
        batch_size: pairs per step.
        learning_rate: of the first step.
        width: feature maps.
        layers: convolutions.
        seed: of all random numbers but a purifier's that has none of its own.
        verbose: show progress bars.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from art_pixeldefend import PixelDefend, datasets
        >>> x = datasets.load("digits").x_test[:8].astype(np.float32) / 255
        >>> surrogate = fit_surrogate(PixelDefend(eps=32, pixel_cnn="digits"), x, steps=20)
        >>> surrogate(torch.from_numpy(x)).shape
        torch.Size([8, 1, 8, 8])
    """
    counts = {"copies": copies, "steps": steps, "batch_size": batch_size, "width": width}
    for name, count in counts.items():
        check_count(name, count)
    check_count("layers", layers, least=2)
    check_number("learning_rate", learning_rate)
    check_count("seed", seed, least=0)
    images = Images(purifier.image_shape, purifier.clip_values, purifier.channels_first)
    given = as_tensor(x)
    images.check(given)
    if not len(given):
        raise ValueError("x must hold at least one image")
    rng = np.random.default_rng(seed)
    unit = images.to_unit(given).float().repeat(copies, 1, 1, 1)
    perturbed = (unit + _blocks(unit, check_number("eps", eps), rng)).clamp(0, 1)
    with torch.no_grad():
        purified = purifier.purified(perturbed).float()
    device = purifier.device if purifier.model is None else purifier.model.device
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        surrogate = Surrogate(unit.shape[1], width, layers).to(device)
    optimizer = torch.optim.Adam(surrogate.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with full_float32(), torch.enable_grad():
        for _ in tqdm(range(steps), unit="step", desc="fit surrogate", disable=not verbose):
            chosen = torch.from_numpy(rng.integers(0, len(unit), batch_size))
            batch, wanted = perturbed[chosen].to(device), purified[chosen].to(device)
            optimizer.zero_grad()
            F.mse_loss(surrogate(batch), wanted).backward()
            optimizer.step()
            schedule.step()
    return surrogate.eval().requires_grad_(False)


def _blocks(x: Tensor, eps: float, rng: np.random.Generator) -> Tensor:
    """Perturbations (N, C, H, W) of random signs, constant in blocks."""
    channels, height, width = x.shape[1:]
    noise = np.empty(x.shape, np.float32)
    for row in noise:
        side = rng.integers(1, 5)
        signs = rng.choice((-1.0, 1.0), (channels, -(-height // side) + 1, -(-width // side) + 1))
        down, right = rng.integers(0, side, 2)
        blocks = signs.repeat(side, 1).repeat(side, 2)
        row[:] = rng.uniform(0, eps) * blocks[:, down : down + height, right : right + width]
    return torch.from_numpy(noise)
