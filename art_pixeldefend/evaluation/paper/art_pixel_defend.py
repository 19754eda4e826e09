"""ART's own PixelDefend for comparison, changed only as far as it needs to run on NumPy 2."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
from art.defences.preprocessor import PixelDefend
from art.estimators.classification.classifier import ClassifierMixin
from art.estimators.estimator import BaseEstimator, NeuralNetworkMixin

from art_pixeldefend.levels import LEVELS, UNIT, to_levels
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.zoo import as_model


class ArtPixelDefend(PixelDefend):
    """``art.defences.preprocessor.PixelDefend`` with a density model of this package.

    It differs from the paper's algorithm: ART evaluates the model once, on the attacked image, and moves each
    sub-pixel to the most likely level given the *attacked* sub-pixels before it. Algorithm 1 conditions on the
    *purified* ones.

    Args:
        clip_values: (0, 1); ART's class supports no other range.
        eps: how far a sub-pixel may move, in levels.
        pixel_cnn: a density model, a bundled name or a path.
        batch_size: images at a time.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> purified, _ = ArtPixelDefend(eps=32, pixel_cnn="digits")(np.zeros((1, 1, 8, 8), np.float32))
        >>> purified.shape
        (1, 1, 8, 8)
    """

    def __init__(
        self,
        clip_values: tuple[float, float] = UNIT,
        eps: int = 16,
        pixel_cnn: PixelCNNpp | str | PathLike[str] | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__(
            clip_values, eps, PixelClassifier(as_model(pixel_cnn, PixelCNNpp, name="pixel_cnn")), batch_size
        )

    def __call__(self, x: np.ndarray, y: Any | None = None) -> tuple[np.ndarray, Any | None]:
        """Purify ``x`` (N, C, H, W) in [0, 1] batch by batch: 256 probabilities per sub-pixel take much memory."""
        pieces = [super(ArtPixelDefend, self).__call__(part.view(_Int64Bytes)) for part in self._batches(x)]
        return np.concatenate([piece.view(np.ndarray) for piece, _ in pieces]) if pieces else x.copy(), y

    def _batches(self, x: np.ndarray) -> list[np.ndarray]:
        return [x[i : i + self.batch_size] for i in range(0, len(x), self.batch_size)]


class PixelClassifier(ClassifierMixin, NeuralNetworkMixin, BaseEstimator):
    """A density model as ART's PixelDefend expects it: a classifier with 256 probabilities per sub-pixel.

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
        """Return p(z | earlier sub-pixels of ``x``), (N, C H W, 256), for images (N, C, H, W) in [0, 1]."""
        levels = to_levels(np.asarray(x))
        return self.model.conditional_log_probs(levels).exp().cpu().numpy().reshape(len(x), -1, LEVELS)

    def predict(self, x: np.ndarray, batch_size: int = 128, **kwargs: Any) -> np.ndarray:
        """Return :meth:`get_activations`."""
        return self.get_activations(x)

    def fit(self, x: np.ndarray, y: np.ndarray, **kwargs: Any) -> None:
        """Raise an error: density models are trained with ``art-pixeldefend train``.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("density models are trained by art_pixeldefend.models.training")


class _Int64Bytes(np.ndarray):
    """An array that converts to int64 where uint8 is asked for.

    ART converts images to ``uint8`` and adds eps, which wraps around since NumPy 2. Its window of levels is then empty,
    and the -1 for an empty window does not fit into a byte (``OverflowError``).
    """

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        """Convert as any array does, except to bytes."""
        return super().astype(np.int64 if dtype == "uint8" else dtype, *args, **kwargs)
