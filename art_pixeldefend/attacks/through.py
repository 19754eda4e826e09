"""Logits of estimators through their purifiers, with a chosen backward pass and replayed random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from art_pixeldefend.purifiers.base import Purifier
from art_pixeldefend.purifiers.purified_model import PurifiedModel


def purifiers_of(estimator: Any) -> list[Purifier]:
    """The purifiers of a PyTorch classifier: among its preprocessing defences, and inside its model."""
    found = [p for p in estimator.preprocessing_operations if isinstance(p, Purifier) and p.apply_predict]
    found += [module.purifier for module in estimator.model.modules() if isinstance(module, PurifiedModel)]
    return list(dict.fromkeys(found))


@contextmanager
def backward_pass(purifiers: Sequence[Purifier], gradient: Any) -> Iterator[None]:
    """Let purifiers use a backward pass, as their argument ``gradient``, in the context; None for their own.

    Raises:
        ValueError: naming ``gradient``, if a purifier does not support it, or if it is a surrogate of one of several
            purifiers.
    """
    if gradient is None:
        yield
        return
    if callable(gradient) and len(purifiers) != 1:
        raise ValueError(f"gradient must be a name for an estimator of {len(purifiers)} purifiers, got a surrogate")
    before = [p.gradient for p in purifiers]
    try:
        for purifier in purifiers:
            purifier.set_params(gradient=gradient)
        yield
    finally:
        for purifier, gradient in zip(purifiers, before, strict=True):
            purifier.gradient = gradient


@contextmanager
def replayed(purifiers: Sequence[Purifier], seed: int, index: Sequence[int], draws: int = 1) -> Iterator[None]:
    """Fix the random numbers of purifiers for a batch that holds ``draws`` neighbouring copies of each image.

    Each copy gets numbers of its own, a function of ``seed`` and the image's place ``index`` in the whole input. A
    purifier with a seed of its own keeps it, and all copies get the numbers that it gives to the image at this place.
    """
    with ExitStack() as stack:
        for purifier in purifiers:
            if purifier.seed is None:
                positions = [i * draws + draw for i in index for draw in range(draws)]
                stack.enter_context(purifier.drawing(seed, positions))
            else:
                stack.enter_context(purifier.drawing(purifier.seed, [i for i in index for _ in range(draws)]))
        yield
