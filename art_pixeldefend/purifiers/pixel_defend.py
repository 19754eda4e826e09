"""PixelDefend, with the arguments of ART's class of that name."""

from __future__ import annotations

import warnings
from os import PathLike

import torch
from torch import Tensor

from art_pixeldefend.levels import UNIT, ClipValues, to_levels
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.decoders import choose_engine, greedy_decode, load_engine
from art_pixeldefend.models.zoo import as_model
from art_pixeldefend.purifiers.base import BatchGenerator, Purifier
from art_pixeldefend.purifiers.soft_window import SoftWindow
from art_pixeldefend.validation import check_eps

UNIFORM = 8.0  # bits per dimension of the uniform distribution over 256 levels
SCORED = 4  # purified images of the first batch that are scored, to find a density model that does not fit


class PixelDefend(Purifier):
    """Purify images with PixelDefend (Song et al., ICLR 2018, Algorithm 1).

        x*[i, j, k] = argmax over z, |z - x[i, j, k]| <= eps, of p(z | x* before it)

    Images are rounded to 8-bit levels first. The result is piecewise constant, so gradients are those of an
    approximation (BPDA). It does not withstand attacks that use this (Athalye et al. 2018, arXiv:1802.00420).

    | Paper link: https://arxiv.org/abs/1710.10766

    Args:
        clip_values: (minimum, maximum) of the images, as numbers or as arrays that broadcast over an image: levels 0
            and 255.
        eps: radius eps_defend in levels, 0..255 (the paper: 32 for Fashion-MNIST, 16 for CIFAR-10).
        pixel_cnn: the density model: a :class:`PixelCNNpp`, the path of one, or the name of a bundled one.
        batch_size: most images in memory at a time.
        apply_fit: purify in the classifier's training, too.
        apply_predict: purify in prediction, and so in attacks.
        verbose: show a progress bar.
        method: the decoder that :func:`greedy_decode` uses; all return the same images.
        gradient: ``"identity"``, or ``"implicit"``, the derivative of the mean of each sub-pixel's conditional
            distribution in a window with soft edges, and of its dependence on earlier sub-pixels
            (:class:`~art_pixeldefend.purifiers.soft_window.SoftWindow`): a better guess at about four times the cost.
        device_type: ``"gpu"`` or ``"cpu"``: where a model that is loaded by path or name goes.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from art_pixeldefend import datasets
        >>> x = datasets.load("digits").x_test[:4]  # uint8
        >>> purified, _ = PixelDefend(clip_values=(0, 255), eps=32, pixel_cnn="digits")(x)
        >>> purified.shape, purified.dtype
        ((4, 1, 8, 8), dtype('uint8'))
    """

    params = [*Purifier.params, "eps", "pixel_cnn", "method"]
    gradients = ("identity", "implicit")
    precision = torch.float64  # rounding to levels is that of the exact value
    recomputed = False  # the backward pass needs no activations

    def __init__(
        self,
        clip_values: ClipValues = (0.0, 1.0),
        eps: int = 16,
        pixel_cnn: PixelCNNpp | str | PathLike[str] | None = None,
        batch_size: int = 128,
        apply_fit: bool = False,
        apply_predict: bool = True,
        verbose: bool = False,
        *,
        method: str = "auto",
        gradient: str = "identity",
        device_type: str = "gpu",
    ) -> None:
        self.eps = eps
        self.pixel_cnn: PixelCNNpp = pixel_cnn  # type: ignore[assignment]  # _check_params loads it
        self.method = method
        self._scored = False
        super().__init__(
            clip_values, batch_size, apply_fit, apply_predict, verbose, gradient=gradient, device_type=device_type
        )

    @property
    def model(self) -> PixelCNNpp:  # type: ignore[override]
        """The density model."""
        return self.pixel_cnn

    def purified(self, x: Tensor, clip_values: ClipValues = UNIT) -> Tensor:
        """Purify images of a given value range, whatever the purifier's own: as :meth:`forward` otherwise."""
        load_engine(self.pixel_cnn, self.method, verbose=self.verbose)  # compiles before the progress bar starts
        return super().purified(x, clip_values)

    def purify(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """Purify images (N, C, H, W) in [0, 1]; every value of the result is one of 256 levels."""
        purified = self.purify_levels(to_levels(x.detach()))
        if not self._scored and len(purified):
            self._scored = True
            self._check_density(purified[:SCORED])
        return SoftWindow.apply(x, purified, self.pixel_cnn, self.eps)

    def purify_levels(self, levels: Tensor) -> Tensor:
        """Purify levels (N, C, H, W), uint8, on the model's device."""
        return greedy_decode(self.pixel_cnn, levels, self.eps, self.method, batch_size=self.batch_size)

    def _check_density(self, purified: Tensor) -> None:
        """Warn if the density model is no better than a uniform distribution, even for the images that it chose.

        Attacked images may have as many bits with a model that fits clean ones well.
        """
        bits = self.pixel_cnn.bits_per_dim(purified).median().item()
        if bits >= UNIFORM:
            warnings.warn(
                f"the density model gives purified images {bits:.1f} bits per dimension, no fewer than a uniform "
                f"distribution ({UNIFORM:g}): it does not fit such images, and purifying is unlikely to help",
                stacklevel=2,
            )

    def _check_params(self) -> None:
        super()._check_params()
        self.pixel_cnn = as_model(self.pixel_cnn, PixelCNNpp, self.device, name="pixel_cnn")
        self.eps = check_eps("eps", self.eps)
        choose_engine(self.pixel_cnn, self.method)
