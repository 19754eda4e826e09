"""PixelCNN++, an autoregressive density model of 8-bit images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from art_pixeldefend.models.base import ImageModel
from art_pixeldefend.models.pixelcnnpp import mixture
from art_pixeldefend.models.pixelcnnpp.layers import WeightNormConv2d, kept_weights
from art_pixeldefend.models.pixelcnnpp.network import PixelCNNppNetwork
from art_pixeldefend.validation import check_count, check_image_shape, check_probability

SCORING_CHUNK = 16  # images per pass on a CPU, where larger batches lose more to memory allocation than they gain
GPU_SCORING_CHUNK = 256  # images per pass on a GPU, which fewer do not keep busy
LEVEL_CHUNK = 32  # levels per pass where the probabilities of all 256 are computed


class PixelCNNpp(ImageModel):
    """PixelCNN++ (Salimans et al. 2017, arXiv:1701.05517), the density model of PixelDefend (arXiv:1710.10766).

        p(x) = prod over rows i, columns j, channels k of p(x[k, i, j] | the sub-pixels before it in that order)

    Each factor is a distribution over 256 levels. All public methods take *levels*: integers 0..255 in NCHW, of any
    dtype, as a tensor or an array.

    Two details differ from OpenAI's PixelCNN++ and Microsoft's PixelDefend code, so their weights cannot be used:

    - They shift the outputs of the first convolutions, which puts zeros into row 0 and column 0. Here the inputs are
      shifted, and the biases of the first convolutions reach row 0 and column 0.
    - The channels of a pixel share the mixture weights. In OpenAI's code one component is drawn for all channels of a
      pixel; here, as in Microsoft's code, each sub-pixel has a mixture of its own given the earlier channels. For grey
      images this is the same.

    Args:
        image_shape: (C, H, W); any C, H and W.
        filters: feature maps of every hidden layer (the paper: 160 for CIFAR-10, 40 for Fashion-MNIST).
        resnets: gated resnets per stage (the paper: 5).
        mixtures: logistic components per sub-pixel (the paper: 10).
        dropout: dropout probability in training.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from art_pixeldefend import PixelCNNpp, datasets
        >>> model = PixelCNNpp.from_pretrained("digits")
        >>> model.bits_per_dim(datasets.load("digits").x_test[:4]).shape
        torch.Size([4])
        >>> model.sample(2).shape
        torch.Size([2, 1, 8, 8])
    """

    kind = "pixelcnnpp"

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        filters: int = 40,
        resnets: int = 5,
        mixtures: int = 10,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.image_shape = check_image_shape(image_shape)
        self.filters = check_count("filters", filters)
        self.resnets = check_count("resnets", resnets)
        self.mixtures = check_count("mixtures", mixtures)
        self.dropout = check_probability("dropout", dropout)
        channels = self.image_shape[0]
        outputs = mixture.parameters_per_pixel(channels, self.mixtures)
        self.network = PixelCNNppNetwork(channels, outputs, self.filters, self.resnets, self.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Mixture parameters (N, P, H, W) for levels (N, C, H, W); those of a pixel depend on earlier pixels only."""
        return self.network((x.to(self.dtype) - mixture.HALF) / mixture.HALF)

    def sub_pixel_log_probs(self, x: Tensor) -> Tensor:
        """log p(x[k, i, j] | earlier sub-pixels) in nats, (N, C, H, W), differentiable in the weights."""
        params = self.mixture_parameters(x)
        levels = x.to(params.dtype).movedim(1, -1)
        channels = range(self.image_shape[0])
        per_channel = [mixture.log_prob(mixture.components(params, levels, k), levels[..., k]) for k in channels]
        return torch.stack(per_channel, dim=1)

    def mixture_parameters(self, x: Tensor) -> Tensor:
        """Mixture parameters (N, H, W, P) for levels ``x``, in float32 or better: mixtures need that precision."""
        params = self(x).movedim(1, -1)
        return params.float() if params.dtype.itemsize < 4 else params

    # Likelihoods and samples

    @torch.no_grad()
    def conditional_log_probs(self, x: Tensor | np.ndarray) -> Tensor:
        """log p(z | earlier sub-pixels of x) of every level z at every sub-pixel, in nats.

        Args:
            x: levels (N, C, H, W).

        Returns:
            (N, C, H, W, 256) on the model's device, in float32, or float64 for a float64 model.

        Raises:
            ValueError: if ``x`` is not a batch of levels of the model's image shape.
        """
        x = self.as_levels(x)
        dtype = torch.promote_types(self.dtype, torch.float32)
        out = torch.empty(*x.shape, mixture.LEVELS, device=self.device, dtype=dtype)
        z = torch.arange(mixture.LEVELS, device=self.device, dtype=dtype)
        with self.evaluating(), kept_weights(self):
            for chunk, result in zip(x.split(SCORING_CHUNK), out.split(SCORING_CHUNK), strict=True):
                params, pixels = self.mixture_parameters(chunk), chunk.to(dtype).movedim(1, -1)
                for k in range(self.image_shape[0]):
                    parts = mixture.components(params, pixels, k).for_each_level()
                    for levels, logs in zip(z.split(LEVEL_CHUNK), result[:, k].split(LEVEL_CHUNK, -1), strict=True):
                        logs.copy_(mixture.log_prob(parts, levels))
        return out

    @torch.no_grad()
    def log_prob(self, x: Tensor | np.ndarray) -> Tensor:
        """log p(x) in nats: (N,), float64.

        Args:
            x: levels (N, C, H, W).

        Raises:
            ValueError: if ``x`` is not a batch of levels of the model's image shape.
        """
        x = self.as_levels(x)
        with self.evaluating(), kept_weights(self):
            pieces = x.split(GPU_SCORING_CHUNK if x.is_cuda else SCORING_CHUNK)
            chunks = [self.sub_pixel_log_probs(piece).double().sum((1, 2, 3)) for piece in pieces]
        return torch.cat(chunks)

    def bits_per_dim(self, x: Tensor | np.ndarray) -> Tensor:
        """Bits per dimension, -log p(x) / (C H W log 2): (N,), float64 (PixelDefend, section 2.3).

        Args:
            x: levels (N, C, H, W).

        Raises:
            ValueError: if ``x`` is not a batch of levels of the model's image shape.
        """
        return -self.log_prob(x) / (math.prod(self.image_shape) * math.log(2))

    def sample(self, count: int, *, seed: int = 0) -> Tensor:
        """Draw images: levels (count, C, H, W), uint8, the same for the same seed.

        Raises:
            ValueError: if ``count`` is negative.
        """
        from art_pixeldefend.models.pixelcnnpp.decoders import sample  # the decoders import this module

        return sample(self, count, seed=seed)

    # Training

    def loss(self, x: Tensor) -> Tensor:
        """Mean bits per dimension of levels ``x`` (N, C, H, W), a differentiable scalar."""
        return -self.sub_pixel_log_probs(x).mean() / math.log(2)

    def evaluate(self, x: Tensor) -> dict[str, float]:
        """Mean bits per dimension of levels ``x`` (N, C, H, W), as ``bits_per_dim``."""
        return {"bits_per_dim": self.bits_per_dim(x).mean().item()}

    @torch.no_grad()
    def initialise(self, x: Tensor | np.ndarray) -> None:
        """Set gains and biases by one pass over levels ``x`` of training images (the paper: 100 images).

        The outputs of every layer then have mean 0 and a given deviation (Salimans and Kingma 2016, arXiv:1602.07868).

        Raises:
            ValueError: if ``x`` is empty, or not a batch of levels of the model's image shape.
        """
        x = self.as_levels(x)
        if not len(x):
            raise ValueError("x must hold at least one image to initialise from")
        layers = [layer for layer in self.modules() if isinstance(layer, WeightNormConv2d)]
        hooks = [layer.register_forward_pre_hook(lambda layer, args: layer.initialise(*args)) for layer in layers]
        try:
            with self.evaluating():
                self(x)
        finally:
            for hook in hooks:
                hook.remove()


def check_pixel_cnn(value: Any) -> None:
    """Check that ``value`` is a :class:`PixelCNNpp`.

    Raises:
        ValueError: naming ``pixel_cnn``.
    """
    if not isinstance(value, PixelCNNpp):
        raise ValueError(f"pixel_cnn must be a PixelCNNpp (from_pretrained and load make one), got {value!r}")
