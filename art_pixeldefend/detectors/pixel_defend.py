"""The detector of PixelDefend: images that are less likely than clean ones under a density model are adversarial."""

from __future__ import annotations

import math
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from art_pixeldefend.detectors.conformal_detector import ConformalDetector
from art_pixeldefend.detectors.scores import Likelihood
from art_pixeldefend.levels import ClipValues
from art_pixeldefend.models import checkpoint
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.zoo import as_model
from art_pixeldefend.purifiers.base import BatchGenerator
from art_pixeldefend.validation import check_choice

REFERENCES = ("calibration", "training")


class PixelDefendDetector(ConformalDetector):
    """Detect adversarial images by their likelihood (the permutation test of Song et al., ICLR 2018, section 3).

        p-value = (1 + number of calibration images with p(x_i) <= p(x)) / (N + 1)

    Images with p-values up to ``alpha`` are flagged. The false-positive rate is at most ``alpha`` for images that are
    exchangeable with the N calibration images and that the density model was not trained on. This is an average over
    calibration sets; the rate for a single set has a standard deviation of about sqrt(alpha (1 - alpha) / N).

    The paper compares with the model's training images instead (``fit(..., reference="training")``). Models find those
    likelier than new images, so that more clean images are flagged: at alpha 0.05 20% of the test images with the
    ``digits`` model and 7.1% with ``fashion-mnist``, for 8.0% and 5.7% with 200 and 2,000 calibration images
    (``benchmarks/calibration.py``).

    The rate holds for images like the calibration images only. At alpha 0.05 the ``fashion-mnist`` model flags 26% of
    clean images saved as JPEG of quality 95, 43% at quality 75, and 30% with noise of one level: calibrate on images
    that went through the same processing as the images to be tested. Constant images are likely under the model: it
    flags 2% of them, and a black one has p = 1 (``benchmarks/false_alarms.py``).

    Fitting evaluates the density model once for each image; :meth:`save` and :meth:`load` keep the result. Reports of
    :meth:`detect` hold ``p_values`` (N,), ``bits_per_dim`` (N,), ``log_likelihoods`` (N,) in nats, the level ``alpha``
    and the ``reference``.

    | Paper link: https://arxiv.org/abs/1710.10766

    Args:
        pixel_cnn: the density model; a :class:`PixelCNNpp`, or the path or name of one, which is loaded onto the GPU
            if there is one.
        clip_values: (minimum, maximum) of the images: levels 0 and 255.
        alpha: significance level, 0 < alpha <= 1.
        batch_size: images scored at a time.
        verbose: show progress bars.

    Attributes:
        log_likelihoods: those of the images that it was fitted to, in nats, in their order; None before :meth:`fit`.
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
        self.pixel_cnn: PixelCNNpp = pixel_cnn  # type: ignore[assignment]  # _check_params loads it
        self.log_likelihoods: np.ndarray | None = None
        self.reference = None
        super().__init__(
            (), alpha=alpha, ties="conservative", round_to_levels=True,
            clip_values=clip_values, batch_size=batch_size, verbose=verbose,
        )  # fmt: skip

    @property
    def calibration_scores(self) -> np.ndarray | None:  # type: ignore[override]
        """Negative log-likelihoods (N, 1) of the images that it was fitted to."""
        return None if self.log_likelihoods is None else -self.log_likelihoods[:, None]

    @calibration_scores.setter
    def calibration_scores(self, scores: np.ndarray | None) -> None:
        self.log_likelihoods = None if scores is None else -scores[:, 0]
        self.reference = None

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
        check_choice("reference", reference, REFERENCES)
        self._check_params()
        self._calibrate(x, batch_size, training=reference == "training")
        self.reference = reference

    def _shown(self, report: dict[str, np.ndarray]) -> dict[str, Any]:
        log_likelihoods = -report["scores"][:, 0]
        return {
            "p_values": report["p_values"],
            "bits_per_dim": self._bits(log_likelihoods),
            "log_likelihoods": log_likelihoods,
            "reference": self.reference,
        }

    def score(self, x: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """Log-likelihoods (N,) of images, in nats, float64.

        Raises:
            ValueError: naming ``x``: a wrong shape, NaN or infinity, or values outside ``clip_values``.
        """
        self._check_params()
        return -self._score(*self._images(x), batch_size, seed=0)[:, 0]

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

        An existing file is replaced.

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

    def _determining(self) -> dict[str, Any]:
        return {"pixel_cnn": self.pixel_cnn}

    def _name(self, k: int) -> str:
        return "pixel_cnn"

    def _check_params(self) -> None:
        self.pixel_cnn = as_model(self.pixel_cnn, PixelCNNpp, name="pixel_cnn")
        self.scores = (_NegativeLogLikelihood(self.pixel_cnn),)
        super()._check_params()


class _NegativeLogLikelihood(Likelihood):
    """The negative log-likelihood in nats, in which files hold it."""

    unit = "nats"

    def score(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        return self.nats(x)
