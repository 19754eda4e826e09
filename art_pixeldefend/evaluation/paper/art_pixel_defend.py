"""ART's own PixelDefend, made to run: for comparison, nothing in it is mended but what stops it."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
from art.defences.preprocessor import PixelDefend
from art.estimators.classification.classifier import ClassifierMixin
from art.estimators.estimator import BaseEstimator, NeuralNetworkMixin

from art_pixeldefend.attacks.budget import LEVELS, to_levels
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.zoo import as_model

UNIT = (0.0, 1.0)


class ArtPixelDefend(PixelDefend):
    """``art.defences.preprocessor.PixelDefend`` with a density model of this package.

    Not the paper's algorithm: ART asks the model once, about the attacked image, and moves each sub-pixel to the most
    likely level given the *attacked* ones before it. Algorithm 1 conditions on the *purified* ones.

    Args:
        clip_values: (0, 1); ART's class knows no other range.
        eps: how far a sub-pixel may move, in levels.
        pixel_cnn: a density model, a bundled name or a path.
        batch_size: images at a time.

    Raises:
        ValueError: naming the argument that is not as described.
    """

    def __init__(
        self,
        clip_values: tuple[float, float] = UNIT,
        eps: int = 16,
        pixel_cnn: PixelCNNpp | str | PathLike[str] | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__(clip_values, eps, Conditionals(as_model(pixel_cnn, PixelCNNpp, name="pixel_cnn")), batch_size)

    def __call__(self, x: np.ndarray, y: Any | None = None) -> tuple[np.ndarray, Any | None]:
        """``x`` (N, C, H, W) in [0, 1] and the same purified, batch by batch: 256 numbers a sub-pixel take memory."""
        pieces = [super(ArtPixelDefend, self).__call__(part.view(_Wide)) for part in self._batches(x)]
        return np.concatenate([piece.view(np.ndarray) for piece, _ in pieces]) if pieces else x.copy(), y

    def _batches(self, x: np.ndarray) -> list[np.ndarray]:
        return [x[i : i + self.batch_size] for i in range(0, len(x), self.batch_size)]


class Conditionals(ClassifierMixin, NeuralNetworkMixin, BaseEstimator):
    """The density model as ART's PixelDefend wants it: a classifier with a layer of 256 probabilities a sub-pixel.

    Args:
        pixel_cnn: the density model.
    """

    def __init__(self, pixel_cnn: PixelCNNpp) -> None:
        super().__init__(model=pixel_cnn, clip_values=UNIT, channels_first=True)
        self.nb_classes = LEVELS

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.model.image_shape

    def get_activations(
        self, x: np.ndarray, layer: int | str = -1, batch_size: int = 128, framework: bool = False
    ) -> np.ndarray:
        """p(z | the sub-pixels of ``x`` before this one), (N, C H W, 256), of images (N, C, H, W) in [0, 1]."""
        levels = to_levels(np.asarray(x), UNIT)
        return self.model.conditional_log_probs(levels).exp().cpu().numpy().reshape(len(x), -1, LEVELS)

    def predict(self, x: np.ndarray, batch_size: int = 128, **kwargs: Any) -> np.ndarray:
        """The same."""
        return self.get_activations(x)

    def fit(self, x: np.ndarray, y: np.ndarray, **kwargs: Any) -> None:
        """Refused: ``art-pixeldefend train`` trains density models.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("density models are trained by art_pixeldefend.models.training")


class _Wide(np.ndarray):
    """An array whose bytes are wide integers.

    ART turns images into ``uint8`` and adds eps to them, which wraps around since NumPy 2: its window of levels is then
    empty, and the -1 that stands for nothing found no longer fits a byte (``OverflowError``).
    """

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        """As any array's, but for bytes."""
        return super().astype(np.int64 if dtype == "uint8" else dtype, *args, **kwargs)
