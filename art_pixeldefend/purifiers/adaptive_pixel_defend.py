"""Adaptive PixelDefend: likely images are left alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
from torch import Tensor

from art_pixeldefend.batches import map_batches
from art_pixeldefend.levels import ClipValues, Images, as_tensor
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.purifiers.base import Purifier
from art_pixeldefend.purifiers.pixel_defend import PixelDefend


class AdaptivePixelDefend(PixelDefend):
    """PixelDefend with eps 0 for images of fewer bits per dimension than ``threshold`` (Song et al. 2018, section 4.2).

    The paper's sentence has the comparison the other way round; its thresholds and its reason, that likely images need
    no purification, say this one.

    | Paper link: https://arxiv.org/abs/1710.10766

    Args:
        clip_values, eps, pixel_cnn, batch_size, apply_fit, apply_predict, verbose, method, device_type: as in
            :class:`PixelDefend`.
        threshold: in bits per dimension (the paper: 1.8 for Fashion-MNIST, 3.2 for CIFAR-10). It belongs to the density
            model: choose it with :meth:`calibrate`.

    Raises:
        ValueError: naming the argument that is not as described.
    """

    params = [*PixelDefend.params, "threshold"]

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
        threshold: float = 0.0,
        method: str = "auto",
        device_type: str = "gpu",
    ) -> None:
        self.threshold = threshold
        super().__init__(
            clip_values, eps, pixel_cnn, batch_size, apply_fit, apply_predict, verbose,
            method=method, device_type=device_type,
        )  # fmt: skip

    def purify_levels(self, levels: Tensor) -> Tensor:
        """Purified levels of levels, both (N, C, H, W), uint8, on the model's device."""
        unlikely = self.pixel_cnn.bits_per_dim(levels) >= self.threshold
        result = levels.clone()
        result[unlikely] = super().purify_levels(levels[unlikely])
        return result

    def calibrate(self, classifier: Any, attacked: Mapping[str, np.ndarray], y: np.ndarray) -> float:
        """Choose ``threshold`` on validation data, set it and return it (Song et al. 2018, appendix B).

        The paper takes the least likelihood above which leaving images alone does not lower the accuracy under the
        strongest attack. In bits per dimension that is the largest threshold that does not.

        Args:
            classifier: an ART classifier that purifies nothing itself: images left alone have to stay so.
            attacked: validation images under each attack, by the attack's name, in the classifier's layout and range.
            y: their labels, as class numbers (N,) or one-hot (N, classes).

        Returns:
            The threshold, in bits per dimension; 0, which purifies every image, if any other one does harm.

        Raises:
            ValueError: naming ``classifier``, if it has a purifier among its preprocessing defences; naming
                ``attacked``, if there is no attack, or images and labels do not match.
        """
        if any(isinstance(defence, Purifier) for defence in classifier.preprocessing_defences or ()):
            raise ValueError("classifier must have no purifier among its preprocessing_defences, or none is left alone")
        y = np.asarray(y)
        if y.ndim == 2:
            y = y[:, 0] if y.shape[1] == 1 else y.argmax(axis=1)
        if not attacked or any(len(x) != len(y) or not len(y) for x in attacked.values()):
            raise ValueError(
                f"attacked must hold, for each attack, as many images as y has labels ({len(y)}), at least 1"
            )
        bits: list[np.ndarray] = []
        alone: list[np.ndarray] = []
        purified: list[np.ndarray] = []
        for x in attacked.values():
            images = Images(self.pixel_cnn.image_shape, self.clip_values)
            like = as_tensor(x)
            levels = images.to_levels(like).to(self.pixel_cnn.device)
            bits.append(map_batches(self.pixel_cnn.bits_per_dim, levels, self.batch_size).cpu().numpy())
            for into, some in ((alone, levels), (purified, super().purify_levels(levels))):
                prediction = classifier.predict(images.from_levels(some, like=like).numpy().astype(x.dtype))
                into.append(prediction.argmax(axis=1) == y)
        self.threshold = largest_harmless_threshold(np.array(bits), np.array(alone), np.array(purified))
        return self.threshold

    def _check_params(self) -> None:
        super()._check_params()
        try:
            self.threshold = float(self.threshold)
        except (TypeError, ValueError):
            self.threshold = math.nan
        if math.isnan(self.threshold) or self.threshold < 0:
            raise ValueError("threshold must be a number of bits per dimension, at least 0")


def largest_harmless_threshold(bits: np.ndarray, alone: np.ndarray, purified: np.ndarray) -> float:
    """The largest threshold whose strongest attack leaves no fewer images right than purifying all of them does.

    Args:
        bits: bits per dimension (attacks, N).
        alone: whether each image is classified rightly as it is, (attacks, N).
        purified: whether it is when purified, (attacks, N).

    Returns:
        One of ``bits``, or 0.
    """
    candidates = np.unique(bits)
    # An image is left alone where its bits are below the threshold: sort once, then every candidate is a prefix sum.
    order = np.argsort(bits, axis=1)
    gains = np.take_along_axis(alone.astype(int) - purified.astype(int), order, axis=1)
    totals = np.concatenate([np.zeros((len(bits), 1), int), gains.cumsum(axis=1)], axis=1)
    right = np.stack(
        [
            purified[a].sum() + totals[a][np.searchsorted(bits[a][order[a]], candidates, side="left")]
            for a in range(len(bits))
        ]
    )
    harmless = right.min(axis=0) >= purified.sum(axis=1).min()
    return float(candidates[harmless].max(initial=0.0))
