"""Detecting adversarial images by the rank of their likelihood among training images."""

from __future__ import annotations

import math
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from art.defences.detector.evasion import EvasionDetector
from torch import Tensor

from art_pixeldefend.batches import map_batches
from art_pixeldefend.levels import ClipValues, Images, as_tensor, check_clip_values
from art_pixeldefend.models import checkpoint
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.zoo import as_model
from art_pixeldefend.purifiers.parameters import all_or_none
from art_pixeldefend.validation import check_count, check_number


class PixelDefendDetector(EvasionDetector):
    """The permutation test of PixelDefend (Song et al., ICLR 2018, section 3).

        p-value = (1 + number of training images with p(x_i) <= p(x)) / (N + 1)

    It is exact: were ``x`` drawn like the N training images, the p-value would be uniform over its N + 1 values. A
    small one says that ``x`` is less likely than the training images are, hence probably adversarial.

    | Paper link: https://arxiv.org/abs/1710.10766

    Args:
        pixel_cnn: the density model; a :class:`PixelCNNpp`, or, to be loaded onto the GPU where there is one, a path
            or the name of a bundled one.
        clip_values: (minimum, maximum) of the images: levels 0 and 255.
        alpha: images with p-values up to this are called adversarial; of clean ones that many are, falsely.
        batch_size: images scored at a time.
        verbose: show progress bars.

    Raises:
        ValueError: naming the argument that is not as described.
    """

    defence_params = ["pixel_cnn", "clip_values", "alpha", "batch_size", "verbose"]

    def __init__(
        self,
        pixel_cnn: PixelCNNpp | str | PathLike[str],
        clip_values: ClipValues = (0.0, 1.0),
        alpha: float = 0.05,
        batch_size: int = 128,
        verbose: bool = False,
    ) -> None:
        super().__init__()
        self.pixel_cnn = as_model(pixel_cnn, PixelCNNpp, name="pixel_cnn")
        self.clip_values: ClipValues = clip_values
        self.alpha = alpha
        self.batch_size, self.verbose = batch_size, verbose
        self.log_likelihoods: np.ndarray | None = None
        self._check_params()

    def fit(
        self,
        x: np.ndarray,
        y: np.ndarray | None = None,
        batch_size: int | None = None,
        nb_epochs: int = 1,
        **kwargs: Any,
    ) -> None:
        """Score the training images and keep their log-likelihoods, sorted, as ``log_likelihoods``.

        Args:
            x: images (N, C, H, W) or (N, H, W, C) within ``clip_values``; what the density model was trained on.
            y: not used.
            batch_size: images scored at a time, if not the detector's own.
            nb_epochs: not used.

        Raises:
            ValueError: naming ``x``: empty, a wrong shape, NaN or infinity, or values outside ``clip_values``.
        """
        scores = self.score(x, batch_size)
        if not len(scores):
            raise ValueError("x must hold at least one training image")
        self.log_likelihoods = np.sort(scores)

    def detect(self, x: np.ndarray, batch_size: int | None = None, **kwargs: Any) -> tuple[dict, np.ndarray]:
        """Test images.

        Args:
            x: images (N, C, H, W) or (N, H, W, C) within ``clip_values``.
            batch_size: images scored at a time, if not the detector's own.

        Returns:
            (report, is_adversarial): the report holds ``p_values`` (N,), ``bits_per_dim`` (N,), ``log_likelihoods``
            (N,) in nats, and the level ``alpha``; is_adversarial is boolean (N,).

        Raises:
            ValueError: if the detector has not been fitted, or naming ``x``.
        """
        if self.log_likelihoods is None:
            raise ValueError("the detector must be fitted, with fit(x_train) or load(path), before it detects")
        scores = self.score(x, batch_size)
        p_values = permutation_p_values(scores, self.log_likelihoods)
        report = {
            "p_values": p_values,
            "bits_per_dim": self._bits(scores),
            "log_likelihoods": scores,
            "alpha": self.alpha,
        }
        return report, p_values <= self.alpha

    def score(self, x: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """Log-likelihoods (N,) of images, in nats, float64.

        Raises:
            ValueError: naming ``x``: a wrong shape, NaN or infinity, or values outside ``clip_values``.
        """
        size = self.batch_size if batch_size is None else check_count("batch_size", batch_size)
        tensor = x if isinstance(x, Tensor) else as_tensor(x)
        levels = Images(self.pixel_cnn.image_shape, self.clip_values).to_levels(tensor).to(self.pixel_cnn.device)
        return map_batches(self.pixel_cnn.log_prob, levels, size, verbose=self.verbose, what="score").cpu().numpy()

    def bits_per_dim(self, x: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """Bits per dimension (N,) of images, float64.

        Raises:
            ValueError: naming ``x``: a wrong shape, NaN or infinity, or values outside ``clip_values``.
        """
        return self._bits(self.score(x, batch_size))

    def _bits(self, scores: np.ndarray) -> np.ndarray:
        return -scores / (math.prod(self.pixel_cnn.image_shape) * math.log(2))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the training images' log-likelihoods, so that they are scored once.

        Raises:
            ValueError: if the detector has not been fitted.
            OSError: if the file cannot be written; nothing partial is left.
        """
        if self.log_likelihoods is None:
            raise ValueError("the detector must be fitted, with fit(x_train), before it is saved")
        header = {"kind": "detector", "model": self.pixel_cnn.fingerprint()}
        checkpoint.write(path, {"log_likelihoods": torch.from_numpy(self.log_likelihoods)}, header)

    def load(self, path: str | PathLike[str]) -> None:
        """Take the log-likelihoods that :meth:`save` wrote, in place of :meth:`fit`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, corrupted, something else, or another model's.
        """
        tensors, header = checkpoint.read(path)
        if header.get("kind") != "detector" or "log_likelihoods" not in tensors:
            raise ValueError(f"path {str(Path(path))!r} holds no detector")
        if header.get("model") != self.pixel_cnn.fingerprint():
            raise ValueError(f"path {str(Path(path))!r} holds log-likelihoods under another density model")
        self.log_likelihoods = tensors["log_likelihoods"].numpy()

    def set_params(self, **kwargs: Any) -> None:
        """As in ART. Another density model makes the log-likelihoods void: :meth:`fit` or :meth:`load` again.

        Raises:
            ValueError: naming the parameter that is not as described; all of them are left as they were.
        """
        before = self.pixel_cnn
        with all_or_none(self):
            super().set_params(**kwargs)
        if self.pixel_cnn is not before:
            self.log_likelihoods = None

    def _check_params(self) -> None:
        self.pixel_cnn = as_model(self.pixel_cnn, PixelCNNpp, name="pixel_cnn")
        self.clip_values = check_clip_values(self.clip_values)
        self.batch_size = check_count("batch_size", self.batch_size)
        self.alpha = check_number("alpha", self.alpha, high=1.0)
        if not isinstance(self.verbose, bool):
            raise ValueError(f"verbose must be a bool, got {self.verbose!r}")


def permutation_p_values(scores: np.ndarray, training_scores: np.ndarray) -> np.ndarray:
    """(1 + training scores <= score) / (N + 1), for each of ``scores`` (M,); ``training_scores`` (N,) are sorted."""
    return (1 + np.searchsorted(training_scores, scores, side="right")) / (len(training_scores) + 1)
