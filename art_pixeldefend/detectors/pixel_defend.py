"""The detector of PixelDefend: images that are less likely than clean ones under a density model are adversarial."""

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
from art_pixeldefend.detectors.conformal import conformal_p_values, least_calibration_images
from art_pixeldefend.levels import ClipValues, Images, as_tensor, check_clip_values
from art_pixeldefend.models import checkpoint
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.zoo import as_model
from art_pixeldefend.purifiers.parameters import all_or_none
from art_pixeldefend.validation import check_count, check_number

REFERENCES = ("calibration", "training")


class PixelDefendDetector(EvasionDetector):
    """Detect adversarial images by their likelihood (the permutation test of Song et al., ICLR 2018, section 3).

        p-value = (1 + number of calibration images with p(x_i) <= p(x)) / (N + 1)

    Images with p-values up to ``alpha`` are flagged. The false-positive rate is at most ``alpha`` for images that are
    exchangeable with the N calibration images and that the density model was not trained on: on average over
    calibration sets. For one of them it varies by about sqrt(alpha (1 - alpha) / N).

    The paper compares with the model's training images instead (``fit(..., reference="training")``). Models find those
    likelier than new images, so that more clean images are flagged: at alpha 0.05 20% of the test images with the
    ``digits`` model and 7.1% with ``fashion-mnist``, for 8.0% and 5.7% with 200 and 2,000 calibration images
    (``benchmarks/calibration.py``).

    The rate holds for images like the calibration images only. At alpha 0.05 the ``fashion-mnist`` model flags 26% of
    clean images saved as JPEG of quality 95, 43% at quality 75, and 30% with noise of one level: calibrate on images
    that are processed as those to be tested. Constant images are likely under the model: it flags 2% of them, and a
    black one has p = 1 (``benchmarks/false_alarms.py``).

    Fitting evaluates the density model once for each image. In a second of CPU time ``fashion-mnist`` scores 159 images
    and ``fashion-mnist-40x5`` 37 (``benchmarks/calibration.py``): 2,000 images take 13 and 54 seconds, 60,000 would
    take 6 and 27 minutes. :meth:`save` and :meth:`load` keep the result.

    | Paper link: https://arxiv.org/abs/1710.10766

    Args:
        pixel_cnn: the density model; a :class:`PixelCNNpp`, or the path or name of one, which is loaded onto the GPU
            if there is one.
        clip_values: (minimum, maximum) of the images: levels 0 and 255.
        alpha: significance level, 0 < alpha <= 1.
        batch_size: images scored at a time.
        verbose: show progress bars.

    Attributes:
        log_likelihoods: those of the images that it was fitted to, in nats, sorted; None before :meth:`fit`.
        reference: what these images are, "calibration" or "training"; None before :meth:`fit`.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from art_pixeldefend import datasets
        >>> data, detector = datasets.load("digits"), PixelDefendDetector("digits", clip_values=(0, 255))
        >>> detector.fit(data.calibration(detector.pixel_cnn).x)
        >>> report, is_adversarial = detector.detect(data.test(detector.pixel_cnn).x[:8])
        >>> is_adversarial.tolist()
        [False, False, False, False, False, False, False, False]
        >>> detector.detect(np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8)))[1].tolist()
        [True, True]
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
        self.reference: str | None = None
        self._check_params()

    def fit(
        self,
        x: np.ndarray,
        y: np.ndarray | None = None,
        batch_size: int | None = None,
        nb_epochs: int = 1,
        *,
        reference: str = "calibration",
        **kwargs: Any,
    ) -> None:
        """Score images that later ones are compared with, and keep their log-likelihoods.

        Args:
            x: images (N, C, H, W) or (N, H, W, C) within ``clip_values``, at least 1 / alpha - 1.
                :meth:`art_pixeldefend.datasets.Dataset.calibration` gives suitable ones.
            y: not used.
            batch_size: images scored at a time, if not the detector's own.
            nb_epochs: not used.
            reference: ``"calibration"``: images that the density model was not trained on. ``"training"``: its
                training images, as in the paper; the false-positive rate may then exceed ``alpha``.

        Raises:
            ValueError: naming ``x``: too few, a wrong shape, NaN or infinity, or values outside ``clip_values``; or
                naming ``reference`` or ``pixel_cnn``, if it gives NaN.
        """
        if reference not in REFERENCES:
            raise ValueError(f"reference must be one of {', '.join(REFERENCES)}, got {reference!r}")
        levels = self._levels(x)
        self._check_enough(len(levels))
        scores = self._score(levels, batch_size)
        if nan := int(np.isnan(scores).sum()):
            raise ValueError(f"pixel_cnn must give numbers, got NaN for {nan} of {len(scores)} images")
        self.log_likelihoods, self.reference = np.sort(scores), reference

    def detect(self, x: np.ndarray, batch_size: int | None = None, **kwargs: Any) -> tuple[dict, np.ndarray]:
        """Compute p-values of images, and flag those of at most ``alpha``.

        Args:
            x: images (N, C, H, W) or (N, H, W, C) within ``clip_values``.
            batch_size: images scored at a time, if not the detector's own.

        Returns:
            (report, is_adversarial): the report holds ``p_values`` (N,), ``bits_per_dim`` (N,), ``log_likelihoods``
            (N,) in nats, the level ``alpha`` and the ``reference``; is_adversarial is boolean (N,). Images for which
            the density model gives NaN are flagged.

        Raises:
            ValueError: if the detector has not been fitted, or naming ``x``, or ``alpha`` if it is too small for the
                number of calibration images.
        """
        if self.log_likelihoods is None:
            raise ValueError("the detector must be fitted, with fit(x_calibration) or load(path), before it detects")
        self._check_params()  # attributes may have been set
        scores = self.score(x, batch_size)
        p_values = conformal_p_values(-scores, -self.log_likelihoods)
        report = {
            "p_values": p_values,
            "bits_per_dim": self._bits(scores),
            "log_likelihoods": scores,
            "alpha": self.alpha,
            "reference": self.reference,
        }
        return report, p_values <= self.alpha

    def score(self, x: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """Log-likelihoods (N,) of images, in nats, float64.

        Raises:
            ValueError: naming ``x``: a wrong shape, NaN or infinity, or values outside ``clip_values``.
        """
        return self._score(self._levels(x), batch_size)

    def _levels(self, x: Any) -> Tensor:
        """Images as levels (N, C, H, W) on the model's device."""
        tensor = x if isinstance(x, Tensor) else as_tensor(x)
        return Images(self.pixel_cnn.image_shape, self.clip_values).to_levels(tensor).to(self.pixel_cnn.device)

    def _score(self, levels: Tensor, batch_size: int | None) -> np.ndarray:
        size = self.batch_size if batch_size is None else check_count("batch_size", batch_size)
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
        """Write the log-likelihoods of the images it was fitted to as safetensors, so that they are scored once.

        Raises:
            ValueError: if the detector has not been fitted.
            OSError: if the file cannot be written; nothing partial is left.
        """
        if self.log_likelihoods is None:
            raise ValueError("the detector must be fitted, with fit(x_calibration), before it is saved")
        header = {"kind": "detector", "model": self.pixel_cnn.fingerprint(), "reference": self.reference}
        checkpoint.write(path, {"log_likelihoods": torch.from_numpy(self.log_likelihoods)}, header)

    def load(self, path: str | PathLike[str]) -> None:
        """Take the log-likelihoods that :meth:`save` wrote, in place of :meth:`fit`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, corrupted, something else, or another model's, or holds too few for
                ``alpha``.
        """
        tensors, header = checkpoint.read(path)
        if header.get("kind") != "detector" or "log_likelihoods" not in tensors:
            raise ValueError(f"path {str(Path(path))!r} is not a file of a detector")
        if header.get("model") != self.pixel_cnn.fingerprint():
            raise ValueError(f"path {str(Path(path))!r} holds log-likelihoods under another density model")
        scores = tensors["log_likelihoods"].numpy()
        self._check_enough(len(scores))
        self.log_likelihoods = scores
        self.reference = header.get("reference", "training")  # files of version 0.1 hold those of training images

    def set_params(self, **kwargs: Any) -> None:
        """Set parameters by name. After a change of ``pixel_cnn``, :meth:`fit` or :meth:`load` again.

        Raises:
            ValueError: naming the parameter that is not as described; all of them are left as they were.
        """
        with all_or_none(self):
            if kwargs.get("pixel_cnn", self.pixel_cnn) is not self.pixel_cnn:
                self.log_likelihoods = self.reference = None
            super().set_params(**kwargs)

    def _check_params(self) -> None:
        self.pixel_cnn = as_model(self.pixel_cnn, PixelCNNpp, name="pixel_cnn")
        self.clip_values = check_clip_values(self.clip_values)
        self.batch_size = check_count("batch_size", self.batch_size)
        self.alpha = check_number("alpha", self.alpha, high=1.0)
        if not self.alpha:
            raise ValueError("alpha must be above 0, or no image is ever flagged, got 0")
        if not isinstance(self.verbose, bool):
            raise ValueError(f"verbose must be a bool, got {self.verbose!r}")
        count = None if self.log_likelihoods is None else len(self.log_likelihoods)
        if count is not None and count < least_calibration_images(self.alpha):
            raise ValueError(f"alpha must be at least 1/{count + 1} with {count} calibration images, got {self.alpha}")

    def _check_enough(self, count: int) -> None:
        """With fewer images no p-value reaches ``alpha``."""
        if count < (least := least_calibration_images(self.alpha)):
            raise ValueError(f"x must hold at least {least} images for alpha {self.alpha:g}, got {count}")
