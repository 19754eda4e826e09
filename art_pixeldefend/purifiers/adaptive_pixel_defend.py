"""Adaptive PixelDefend: images that are likely enough are not purified."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from torch import Tensor

from art_pixeldefend.batches import map_batches
from art_pixeldefend.levels import ClipValues, Images, as_tensor
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.purifiers.base import Purifier
from art_pixeldefend.purifiers.pixel_defend import PixelDefend
from art_pixeldefend.purifiers.purified_model import PurifiedModel
from art_pixeldefend.validation import check_labels

CLEAN = "clean"  # the name of images without an attack


class AdaptivePixelDefend(PixelDefend):
    """PixelDefend for images of at least ``threshold`` bits per dimension; others are returned as they are.

    Song et al. (ICLR 2018), section 4.2. (The paper's sentence has the comparison the other way round; its thresholds
    and its reason, that likely images need no purification, agree with this one.)

    An attacker who knows the threshold can keep images below it, where nothing is purified.

    | Paper link: https://arxiv.org/abs/1710.10766

    Args:
        clip_values, eps, pixel_cnn, batch_size, apply_fit, apply_predict, verbose, method, gradient, device_type: as
            in :class:`PixelDefend`.
        threshold: bits per dimension (the paper: 1.8 for Fashion-MNIST, 3.2 for CIFAR-10). It belongs to a density
            model: choose it with :meth:`calibrate`.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from art_pixeldefend import datasets
        >>> x = datasets.load("digits").x_test[:6]
        >>> purified, _ = AdaptivePixelDefend((0, 255), eps=32, pixel_cnn="digits", threshold=3.0)(x)
        >>> (purified == x).all(axis=(1, 2, 3)).tolist()
        [False, True, True, False, False, True]
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
        gradient: str = "identity",
        device_type: str = "gpu",
    ) -> None:
        self.threshold = threshold
        super().__init__(
            clip_values, eps, pixel_cnn, batch_size, apply_fit, apply_predict, verbose,
            method=method, gradient=gradient, device_type=device_type,
        )  # fmt: skip

    def purify_levels(self, levels: Tensor) -> Tensor:
        """Purify levels (N, C, H, W), uint8, on the model's device; those of too few bits per dimension are kept."""
        unlikely = ~(self.pixel_cnn.bits_per_dim(levels) < self.threshold)  # NaN is purified
        result = levels.clone()
        result[unlikely] = super().purify_levels(levels[unlikely])
        return result

    def calibrate(
        self, classifier: Any, attacked: Mapping[str, np.ndarray | Mapping[str, np.ndarray]], y: np.ndarray
    ) -> float:
        """Choose ``threshold`` on validation images, set it and return it (Song et al. 2018, appendix B).

        The paper takes the least likelihood above which returning images as they are does not lower the accuracy under
        the strongest attack. In bits per dimension that is the largest threshold that does not.

        This holds for later images only if they are exchangeable with the validation images, and if neither the density
        model nor the classifier was trained on these: :meth:`art_pixeldefend.datasets.Dataset.reserve` gives such
        images. It holds for the given attacks only: include one that keeps images likely, such as CW, or the threshold
        may rise until hardly any image is purified.

        Args:
            classifier: an ART classifier without a purifier.
            attacked: validation images under each attack, by the attack's name, in the classifier's layout and range.
                A dictionary of attacks in the place of images, for example those within one radius, has a strongest
                attack of its own: the threshold must not lower the accuracy under any of these. Images under the name
                "clean" are not taken for an attack: if more than half of them were not purified, a warning says so.
            y: their labels, as class numbers (N,) or one-hot (N, classes).

        Returns:
            The threshold, in bits per dimension; 0, which purifies every image, if any other lowers the accuracy.

        Raises:
            ValueError: naming ``classifier``, if it purifies; ``attacked``, if it is not a dictionary with an attack
                or has not one image for each label; ``y``, if it does not hold labels; or ``pixel_cnn``, if it gives
                NaN.
        """
        defences = getattr(classifier, "preprocessing_defences", None) or ()
        if isinstance(getattr(classifier, "model", None), PurifiedModel) or any(
            isinstance(defence, Purifier) for defence in defences
        ):
            raise ValueError("classifier must not purify images itself, or none is classified as it is")
        given = {
            (group, name): _as_given(x)
            for group, named in (attacked.items() if isinstance(attacked, Mapping) else ())
            for name, x in (named if isinstance(named, Mapping) else {"": named}).items()
        }
        clean = (CLEAN, "")
        names = [name for name in given if name != clean]
        if not names:
            raise ValueError(f"attacked must hold images by the name of at least one attack, got {type(attacked)}")
        labels = check_labels("y", y)
        if not len(labels) or any(len(x) != len(labels) for x in given.values()):
            raise ValueError(
                f"attacked must hold, for each attack, as many images as y has labels ({len(labels)}), at least 1"
            )
        images = Images(self.pixel_cnn.image_shape, self.clip_values)
        levels = {name: images.to_levels(x).to(self.pixel_cnn.device) for name, x in given.items()}
        bits = {
            name: map_batches(self.pixel_cnn.bits_per_dim, x, self.batch_size).cpu().numpy()
            for name, x in levels.items()
        }
        if any(np.isnan(values).any() for values in bits.values()):
            raise ValueError("pixel_cnn must give numbers of bits per dimension, got NaN")

        def is_right(name: tuple[str, str], levels: Tensor) -> np.ndarray:
            predicted = classifier.predict(images.from_levels(levels, like=given[name]).numpy())
            return predicted.argmax(axis=1) == labels

        groups = [group if attack else "" for group, attack in names]  # attacks by themselves are one group
        kept = [is_right(name, levels[name]) for name in names]
        purified = [is_right(name, super(AdaptivePixelDefend, self).purify_levels(levels[name])) for name in names]
        attacked_bits = np.array([bits[name] for name in names])
        self.threshold = largest_harmless_threshold(attacked_bits, np.array(kept), np.array(purified), groups)
        if clean in bits and (share := (bits[clean] < self.threshold).mean()) > 0.5:
            warnings.warn(
                f"{share:.0%} of the clean images have fewer bits per dimension than the threshold "
                f"{self.threshold:.3f} and are not purified; neither are attacked images as likely as those",
                stacklevel=2,
            )
        return self.threshold

    def _check_params(self) -> None:
        super()._check_params()
        try:
            self.threshold = float(self.threshold)
        except (TypeError, ValueError):
            self.threshold = math.nan
        if math.isnan(self.threshold) or self.threshold < 0:
            raise ValueError("threshold must be a number of bits per dimension, at least 0")


def _as_given(x: Any) -> Tensor:
    """Images as a tensor of their dtype; lists have none, and become float32."""
    if isinstance(x, Tensor):
        return x.detach().cpu()
    return as_tensor(x) if isinstance(x, np.ndarray) else as_tensor(x).float()


def largest_harmless_threshold(
    bits: np.ndarray, kept: np.ndarray, purified: np.ndarray, groups: Sequence[str]
) -> float:
    """The largest threshold for which the accuracy under each strongest attack is at least that without a threshold.

    Args:
        bits: bits per dimension (attacks, N).
        kept: whether each image is classified correctly as it is, (attacks, N).
        purified: whether it is classified correctly when purified, (attacks, N).
        groups: the group of each attack, (attacks,); each has a strongest attack.

    Returns:
        One of ``bits``, or 0.
    """
    candidates = np.unique(bits)
    # Images with fewer bits than the threshold are kept: sort once, then each candidate's gain is a prefix sum.
    order = np.argsort(bits, axis=1)
    gains = np.take_along_axis(kept.astype(int) - purified.astype(int), order, axis=1)
    totals = np.concatenate([np.zeros((len(bits), 1), int), gains.cumsum(axis=1)], axis=1)
    correct = np.stack(
        [
            purified[a].sum() + totals[a][np.searchsorted(bits[a][order[a]], candidates, side="left")]
            for a in range(len(bits))
        ]
    )
    members = [np.array(groups) == group for group in set(groups)]
    harmless = [correct[group].min(axis=0) >= purified[group].sum(axis=1).min() for group in members]
    return float(candidates[np.all(harmless, axis=0)].max(initial=0.0))
