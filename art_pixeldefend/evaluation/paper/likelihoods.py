"""Log-likelihoods of a grid's images under its density model, computed once and stored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from art_pixeldefend.detectors import PixelDefendDetector
from art_pixeldefend.evaluation.grid import Cell
from art_pixeldefend.evaluation.paper.grids import DENSITY_MODEL
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Settings
from art_pixeldefend.levels import UNIT, from_levels
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp


def density_model(stages: Stages) -> PixelCNNpp:
    """Return the density model of one of the paper's grids.

    Raises:
        ValueError: if the model of this name is of another kind.
    """
    model = stages.image_model(DENSITY_MODEL)
    if not isinstance(model, PixelCNNpp):
        raise ValueError(f"models must have a PixelCNNpp as {DENSITY_MODEL!r}, got a {type(model).__name__}")
    return model


def scores(stages: Stages, cell: Cell, start: int, count: int) -> np.ndarray:
    """Return log-likelihoods (count,) in nats of a cell's images after its defence."""
    key = {"images": stages.defended_key(cell, start, count)}
    return _scores(stages, key, lambda: stages.defended(cell, start, count))


def reference_scores(stages: Stages, count: int) -> np.ndarray:
    """Return log-likelihoods in nats of up to ``count`` images that the grid's figures compare with."""
    split = stages.grid.reference
    images = stages.splits["train"] if split == "training" else stages.data.calibration(density_model(stages))
    x = images[0][:count]
    return _scores(stages, {"images": [stages.data_key, split, len(x)]}, lambda: from_levels(x))


def _scores(stages: Stages, key: Settings, images: Callable[[], np.ndarray]) -> np.ndarray:
    key = {**key, "density_model": stages.fingerprint(DENSITY_MODEL)}
    if (kept := stages.store.read("scores", key)) is None:
        detector = PixelDefendDetector(density_model(stages), UNIT, batch_size=stages.grid.chunk)
        kept = {"log_likelihoods": detector.score(images()).tolist()}
        stages.store.write("scores", key, kept)
    return np.array(kept["log_likelihoods"])
