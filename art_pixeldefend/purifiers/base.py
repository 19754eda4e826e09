"""What every purifier shares: levels and clip values, image layout, dtypes, a backward pass that masks no gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from torch import Tensor

from art_pixeldefend.levels import Images, check_clip_values
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.zoo import as_model
from art_pixeldefend.purifiers.parameters import all_or_none
from art_pixeldefend.validation import check_count


class StraightThrough(torch.autograd.Function):
    """Forward: the purified image. Backward: the identity (BPDA, Athalye et al. 2018, arXiv:1802.00420).

    A purifier is piecewise constant. Its true gradient is zero almost everywhere, and an attack that follows it fails
    for a reason that has nothing to do with robustness.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, purified: Tensor) -> Tensor:
        """``purified``."""
        return purified

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient for ``x``."""
        return gradient, None


class Purifier(PreprocessorPyTorch):
    """Base of the purifiers: ART hands over images of some layout, range and dtype, a subclass sees levels.

    Args:
        clip_values: (minimum, maximum) of the images: levels 0 and 255.
        pixel_cnn: the density model; a :class:`PixelCNNpp`, a path, or the name of a bundled one.
        batch_size: most images in memory at a time.
        apply_fit: purify in the classifier's training, too.
        apply_predict: purify in prediction, and so in attacks.
        verbose: show a progress bar.
        device_type: ``"gpu"`` or ``"cpu"``: where a model that is loaded by path or name goes. A model that is passed
            stays where it is.

    Raises:
        ValueError: naming the argument that is not as described.
    """

    params = ["clip_values", "pixel_cnn", "batch_size", "verbose"]

    def __init__(
        self,
        clip_values: tuple[float, float] = (0.0, 1.0),
        pixel_cnn: PixelCNNpp | str | PathLike[str] | None = None,
        batch_size: int = 128,
        apply_fit: bool = False,
        apply_predict: bool = True,
        verbose: bool = False,
        *,
        device_type: str = "gpu",
    ) -> None:
        if device_type not in ("gpu", "cpu"):
            raise ValueError(f"device_type must be 'gpu' or 'cpu', got {device_type!r}")
        super().__init__(device_type=device_type, is_fitted=True, apply_fit=apply_fit, apply_predict=apply_predict)
        self.clip_values = clip_values
        self.pixel_cnn = as_model(pixel_cnn, PixelCNNpp, self.device, name="pixel_cnn")
        self.batch_size = batch_size
        self.verbose = verbose

    @abstractmethod
    def purify(self, levels: Tensor) -> Tensor:
        """Purified levels of levels, both (N, C, H, W), uint8, on the model's device."""

    def forward(self, x: Tensor, y: Any | None = None) -> tuple[Tensor, Any | None]:
        """Purify a batch; autograd passes through as if this were the identity.

        Args:
            x: images (N, C, H, W) or (N, H, W, C) of the model's image shape, within ``clip_values``, of any dtype.
            y: labels, handed through.

        Returns:
            Images of the shape, dtype and device of ``x``, each value one of 256; and ``y``.

        Raises:
            ValueError: naming ``x``: a wrong shape, NaN or infinity, or values outside ``clip_values``.
        """
        images = Images(self.pixel_cnn.image_shape, self.clip_values)
        levels = images.to_levels(x.detach()).to(self.pixel_cnn.device)
        purified = images.from_levels(self.purify(levels), like=x)
        return (StraightThrough.apply(x, purified) if x.is_floating_point() else purified), y

    def __call__(self, x: np.ndarray, y: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Purify a batch of arrays, for estimators of any framework.

        Args:
            x: images (N, C, H, W) or (N, H, W, C) of the model's image shape, within ``clip_values``, of any dtype.
            y: labels, handed through.

        Returns:
            Images of the shape and dtype of ``x``; and ``y``.

        Raises:
            ValueError: naming ``x``: a wrong shape, NaN or infinity, or values outside ``clip_values``.
        """
        with torch.no_grad():
            purified, _ = self.forward(Images.as_tensor(x))
        return purified.cpu().numpy().astype(np.asarray(x).dtype, copy=False), y

    def estimate_gradient(self, x: np.ndarray, grad: np.ndarray) -> np.ndarray:
        """The gradient at the purified image, handed through (BPDA); purifying once more would tell nothing new."""
        return grad

    def set_params(self, **kwargs: Any) -> None:
        """As in ART.

        Raises:
            ValueError: naming the parameter that is not as described; all of them are left as they were.
        """
        with all_or_none(self):
            super().set_params(**kwargs)

    def _check_params(self) -> None:
        self.clip_values = check_clip_values(self.clip_values)
        self.pixel_cnn = as_model(self.pixel_cnn, PixelCNNpp, self.device, name="pixel_cnn")
        self.batch_size = check_count("batch_size", self.batch_size)
        if not isinstance(self.verbose, bool):
            raise ValueError(f"verbose must be a bool, got {self.verbose!r}")

    def __repr__(self) -> str:
        names: Sequence[str] = [name for name in self.params if name != "pixel_cnn"]
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({settings})"
