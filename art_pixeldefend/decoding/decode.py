"""The functions users call, and the choice of the engine behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import numpy as np
import torch
from torch import Tensor

from art_pixeldefend.batches import map_batches
from art_pixeldefend.decoding import fixed_point, reference
from art_pixeldefend.decoding.rules import Ancestral, Greedy
from art_pixeldefend.density import PixelCNNpp
from art_pixeldefend.validation import check_count, check_eps

Engine = Callable[[PixelCNNpp, Tensor, int], Tensor]

ENGINES: dict[str, Engine] = {
    "reference": reference.decode,
    "fixed-point": lambda pixel_cnn, x, eps: fixed_point.decode(pixel_cnn, x, Greedy(x, eps)),
}
BATCH_SIZE = 128


def engine(method: str) -> Engine:
    """The engine of this name; ``"auto"`` is the fastest that is there.

    Raises:
        ValueError: if there is none of that name.
    """
    if method != "auto" and method not in ENGINES:
        raise ValueError(f"method must be one of auto, {', '.join(ENGINES)}, got {method!r}")
    return ENGINES["fixed-point" if method == "auto" else method]


@overload
def greedy_decode(pixel_cnn: PixelCNNpp, x: Tensor, eps: int, method: str = ..., **options) -> Tensor: ...
@overload
def greedy_decode(pixel_cnn: PixelCNNpp, x: np.ndarray, eps: int, method: str = ..., **options) -> np.ndarray: ...
def greedy_decode(pixel_cnn, x, eps, method="auto", *, batch_size=BATCH_SIZE, verbose=False):
    """Move every sub-pixel, within ``eps``, to its most likely level given those already moved (Algorithm 1).

    Args:
        pixel_cnn: the density model.
        x: levels (N, C, H, W) of the model's image shape.
        eps: radius in levels, 0..255, around the input's value.
        method: ``"reference"``, ``"fixed-point"`` or ``"auto"``; all give the same image.
        batch_size: most images in memory at a time.
        verbose: show a progress bar.

    Returns:
        Purified levels (N, C, H, W), uint8: a tensor on the model's device for a tensor, an array for an array.

    Raises:
        ValueError: naming the argument that is not as described.
    """
    decode, eps, batch_size = engine(method), check_eps("eps", eps), check_count("batch_size", batch_size)
    levels = pixel_cnn.as_levels(x)
    with pixel_cnn.evaluating():
        purified = map_batches(
            lambda batch: decode(pixel_cnn, batch, eps), levels, batch_size, verbose=verbose, what="purify"
        )
    return purified if isinstance(x, Tensor) else purified.cpu().numpy()


def sample(pixel_cnn: PixelCNNpp, count: int, *, seed: int = 0) -> Tensor:
    """Images drawn from the model.

    Args:
        pixel_cnn: the density model.
        count: how many, N.
        seed: of the noise.

    Returns:
        Levels (N, C, H, W), uint8, on the model's device; the same for the same seed.

    Raises:
        ValueError: if ``count`` is negative.
    """
    count = check_count("count", count, least=0)
    rule = Ancestral(count, pixel_cnn.image_shape, pixel_cnn.mixtures, torch.Generator().manual_seed(seed))
    start = torch.zeros(count, *pixel_cnn.image_shape, dtype=torch.uint8, device=pixel_cnn.device)
    with pixel_cnn.evaluating():
        return fixed_point.decode(pixel_cnn, start, rule)
