"""Decoding and sampling, and the choice of the engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import overload

import numpy as np
import torch
from torch import Tensor

from art_pixeldefend.batches import map_batches
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp, check_pixel_cnn
from art_pixeldefend.models.pixelcnnpp.compilation import compilation_notice, has_numba
from art_pixeldefend.models.pixelcnnpp.decoders.cached import cached_decode
from art_pixeldefend.models.pixelcnnpp.decoders.fixed_point import fixed_point_decode
from art_pixeldefend.models.pixelcnnpp.decoders.reference import reference_decode
from art_pixeldefend.models.pixelcnnpp.decoders.rules import Ancestral, Greedy
from art_pixeldefend.validation import check_choice, check_count, check_eps

Engine = Callable[[PixelCNNpp, Tensor, int], Tensor]
BATCH_SIZE = 128


def _load_compiled() -> Engine:
    from art_pixeldefend.models.pixelcnnpp.decoders.compiled import compiled_decode  # needs Numba, and compiles

    return compiled_decode


def _load_graphed() -> Engine:
    from art_pixeldefend.models.pixelcnnpp.decoders.graphed import graphed_decode  # needs Triton

    return graphed_decode


@cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except Exception:  # an installed Triton that does not fit this Python or PyTorch raises various errors
        return False
    return True


ENGINES: dict[str, Callable[[], Engine]] = {  # functions that load an engine
    "reference": lambda: reference_decode,
    "fixed-point": lambda: lambda pixel_cnn, x, eps: fixed_point_decode(pixel_cnn, x, Greedy(x, eps)),
    "cached": lambda: lambda pixel_cnn, x, eps: cached_decode(pixel_cnn, x, Greedy(x, eps)),
    "compiled": _load_compiled,
    "graphed": _load_graphed,
}


def why_not(engine: str, pixel_cnn: PixelCNNpp) -> str:
    """What an engine lacks to decode with this model, or nothing."""
    if engine == "compiled":
        if not has_numba():
            return "Numba, installed and not disabled"
        if pixel_cnn.device.type != "cpu" or pixel_cnn.dtype != torch.float32:
            return "a model on the CPU with float32 parameters"
    if engine == "graphed":
        if not has_triton():
            return "Triton"
        if pixel_cnn.device.type != "cuda" or pixel_cnn.dtype == torch.float64:
            return "a model on an NVIDIA GPU, not in double precision"
    return ""


def choose_engine(pixel_cnn: PixelCNNpp, method: str) -> str:
    """The name of the engine for a method: the method itself, or for ``"auto"`` the fastest engine for this model.

    ``"auto"`` is ``compiled`` for a float32 model on a CPU, ``graphed`` on an NVIDIA GPU, and ``cached`` otherwise or
    where Numba or Triton is missing. ``benchmarks/README.md`` has the measurements.

    Raises:
        ValueError: if there is no such method, or its engine cannot decode with this model.
    """
    if check_choice("method", method, ("auto", *ENGINES)) == "auto":
        return next(engine for engine in ("compiled", "graphed", "cached") if not why_not(engine, pixel_cnn))
    if lacking := why_not(method, pixel_cnn):
        raise ValueError(f'method {method!r} needs {lacking}; "auto" chooses an engine that fits')
    return method


def load_engine(pixel_cnn: PixelCNNpp, method: str, *, verbose: bool = False) -> Engine:
    """Load the engine for a method. The first time on a machine ``compiled`` takes some seconds to compile.

    Args:
        pixel_cnn: the density model.
        method: as for :func:`greedy_decode`.
        verbose: print a line if code is being compiled.

    Returns:
        A function from a model, levels (N, C, H, W) and eps to levels.

    Raises:
        ValueError: as :func:`choose_engine`.
    """
    engine = choose_engine(pixel_cnn, method)
    with compilation_notice() if verbose else nullcontext():
        return ENGINES[engine]()


@overload
def greedy_decode(pixel_cnn: PixelCNNpp, x: Tensor, eps: int, method: str = ..., **options) -> Tensor: ...
@overload
def greedy_decode(pixel_cnn: PixelCNNpp, x: np.ndarray, eps: int, method: str = ..., **options) -> np.ndarray: ...
def greedy_decode(pixel_cnn, x, eps, method="auto", *, batch_size=BATCH_SIZE, verbose=False):
    """Move every sub-pixel, within ``eps``, to its most likely level given those already moved (Algorithm 1).

    Args:
        pixel_cnn: the density model. In float32 the result is exact; after ``pixel_cnn.bfloat16()`` levels differ at
            some sub-pixels, as measured in ``benchmarks/README.md``.
        x: levels (N, C, H, W) of the model's image shape.
        eps: radius in levels, 0..255, around the input's value.
        method: the engine, or ``"auto"``: ``"compiled"`` for a float32 model on a CPU, ``"graphed"`` on an NVIDIA GPU,
            and ``"cached"`` otherwise. ``"fixed-point"`` and ``"reference"`` are slow and independent of these. All
            give the same image.
        batch_size: largest number of images to decode at a time.
        verbose: show a progress bar.

    Returns:
        Purified levels (N, C, H, W), uint8: a tensor on the model's device for a tensor, an array for an array.

    Raises:
        ValueError: naming the argument that is not as described; ``pixel_cnn`` if its outputs are not finite.

    Example:
        >>> from art_pixeldefend import PixelCNNpp, datasets, greedy_decode
        >>> model = PixelCNNpp.from_pretrained("digits")
        >>> x = datasets.load("digits").x_test[:2]
        >>> greedy_decode(model, x, eps=16).shape
        (2, 1, 8, 8)
    """
    check_pixel_cnn(pixel_cnn)
    eps, batch_size = check_eps("eps", eps), check_count("batch_size", batch_size)
    levels = pixel_cnn.as_levels(x)
    decode = load_engine(pixel_cnn, method, verbose=verbose)
    with pixel_cnn.evaluating():
        purified = map_batches(
            lambda batch: decode(pixel_cnn, batch, eps), levels, batch_size, verbose=verbose, what="purify"
        )
    return purified if isinstance(x, Tensor) else purified.cpu().numpy()


def sample(pixel_cnn: PixelCNNpp, count: int, *, seed: int = 0) -> Tensor:
    """Draw images from the model.

    Args:
        pixel_cnn: the density model.
        count: number of images, N.
        seed: determines the images, together with the model and ``count``.

    Returns:
        Levels (N, C, H, W), uint8, on the model's device.

    Raises:
        ValueError: naming the argument that is not as described; ``pixel_cnn`` if its outputs are not finite.
    """
    check_pixel_cnn(pixel_cnn)
    count = check_count("count", count, least=0)
    rule = Ancestral(count, pixel_cnn.image_shape, pixel_cnn.mixtures, torch.Generator().manual_seed(seed))
    start = torch.zeros(count, *pixel_cnn.image_shape, dtype=torch.uint8, device=pixel_cnn.device)
    with pixel_cnn.evaluating():
        return cached_decode(pixel_cnn, start, rule)
