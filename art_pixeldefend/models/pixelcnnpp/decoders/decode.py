"""The functions users call, and the choice of the engine behind them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import overload

import numpy as np
import torch
from torch import Tensor

from art_pixeldefend.batches import map_batches
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp, check_pixel_cnn
from art_pixeldefend.models.pixelcnnpp.decoders import cached, fixed_point, reference
from art_pixeldefend.models.pixelcnnpp.decoders.rules import Ancestral, Greedy
from art_pixeldefend.validation import check_count, check_eps

Engine = Callable[[PixelCNNpp, Tensor, int], Tensor]


def _compiled(pixel_cnn: PixelCNNpp, x: Tensor, eps: int) -> Tensor:
    from art_pixeldefend.models.pixelcnnpp.decoders import compiled  # seconds of work, and Numba may be absent

    return compiled.decode(pixel_cnn, x, eps)


def compiled_engine_fits(pixel_cnn: PixelCNNpp) -> bool:
    """Is Numba there, and the model on the CPU and in single precision, all that the compiled engine knows?"""
    return pixel_cnn.device.type == "cpu" and pixel_cnn.dtype == torch.float32 and has_numba()


@cache
def has_numba() -> bool:
    """Can the compiled engine be imported?"""
    try:
        import numba  # noqa: F401
    except Exception:  # a Numba that is there but does not fit this Python or NumPy raises what it likes
        return False
    return True


def _graphed(pixel_cnn: PixelCNNpp, x: Tensor, eps: int) -> Tensor:
    from art_pixeldefend.models.pixelcnnpp.decoders import graphed  # Triton may be absent

    return graphed.decode(pixel_cnn, x, eps)


def graphed_engine_fits(pixel_cnn: PixelCNNpp) -> bool:
    """Is Triton there, and the model on an NVIDIA GPU, and not in double precision?"""
    return pixel_cnn.device.type == "cuda" and pixel_cnn.dtype != torch.float64 and has_triton()


@cache
def has_triton() -> bool:
    """Can the graphed engine be imported?"""
    try:
        import triton  # noqa: F401
    except Exception:  # likewise
        return False
    return True


FITS = {"compiled": compiled_engine_fits, "graphed": graphed_engine_fits}  # engines that are not for every model
ENGINES: dict[str, Engine] = {
    "reference": reference.decode,
    "fixed-point": lambda pixel_cnn, x, eps: fixed_point.decode(pixel_cnn, x, Greedy(x, eps)),
    "cached": lambda pixel_cnn, x, eps: cached.decode(pixel_cnn, x, Greedy(x, eps)),
    "compiled": _compiled,
    "graphed": _graphed,
}
BATCH_SIZE = 128


def choose_engine(pixel_cnn: PixelCNNpp, method: str) -> str:
    """The name of the engine behind a method: itself, or for ``"auto"`` the fastest that is there for this model.

    The rule: the compiled engine wherever it fits, on a CPU, where it is the fastest at every batch size by the
    measurements in ``benchmarks/README.md``; the graphed one wherever that fits, on a GPU: it is the cached one with
    fewer launches; the cached one everywhere else.

    Raises:
        ValueError: if there is no method of that name.
    """
    if method not in ("auto", *ENGINES):
        raise ValueError(f"method must be one of auto, {', '.join(ENGINES)}, got {method!r}")
    if method == "auto":
        return next((engine for engine, fits in FITS.items() if fits(pixel_cnn)), "cached")
    return method if method not in FITS or FITS[method](pixel_cnn) else "cached"


@overload
def greedy_decode(pixel_cnn: PixelCNNpp, x: Tensor, eps: int, method: str = ..., **options) -> Tensor: ...
@overload
def greedy_decode(pixel_cnn: PixelCNNpp, x: np.ndarray, eps: int, method: str = ..., **options) -> np.ndarray: ...
def greedy_decode(pixel_cnn, x, eps, method="auto", *, batch_size=BATCH_SIZE, verbose=False):
    """Move every sub-pixel, within ``eps``, to its most likely level given those already moved (Algorithm 1).

    Args:
        pixel_cnn: the density model. In float32 the answer is exact; after ``pixel_cnn.bfloat16()`` it is not: levels
            differ at some sub-pixels, ``benchmarks/README.md`` says at how many.
        x: levels (N, C, H, W) of the model's image shape.
        eps: radius in levels, 0..255, around the input's value.
        method: ``"reference"``, ``"fixed-point"``, ``"cached"``, ``"compiled"``, ``"graphed"``, or ``"auto"`` for the
            fastest that is there; all give the same image. ``"compiled"`` is for CPUs and needs Numba, ``"graphed"`` is
            for NVIDIA GPUs and needs Triton: where they cannot work they are ``"cached"``.
        batch_size: most images in memory at a time.
        verbose: show a progress bar.

    Returns:
        Purified levels (N, C, H, W), uint8: a tensor on the model's device for a tensor, an array for an array.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from art_pixeldefend import PixelCNNpp, datasets
        >>> model, x = PixelCNNpp.from_pretrained("digits"), datasets.load("digits").x_test[:4]
        >>> purified = greedy_decode(model, x, eps=32)
        >>> int(np.abs(purified.astype(int) - x).max()) <= 32
        True
        >>> bool((model.bits_per_dim(purified) < model.bits_per_dim(x)).all())
        True
    """
    check_pixel_cnn(pixel_cnn)
    decode = ENGINES[choose_engine(pixel_cnn, method)]
    eps, batch_size = check_eps("eps", eps), check_count("batch_size", batch_size)
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
        ValueError: if ``pixel_cnn`` is none, or ``count`` is negative.
    """
    check_pixel_cnn(pixel_cnn)
    count = check_count("count", count, least=0)
    rule = Ancestral(count, pixel_cnn.image_shape, pixel_cnn.mixtures, torch.Generator().manual_seed(seed))
    start = torch.zeros(count, *pixel_cnn.image_shape, dtype=torch.uint8, device=pixel_cnn.device)
    with pixel_cnn.evaluating():
        return cached.decode(pixel_cnn, start, rule)
