"""ART preprocessors from plain data: an import path and arguments, one or several in turn."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from art.defences.preprocessor import Preprocessor

Step = tuple[str, Mapping[str, Any]]  # import path of a preprocessor class, its arguments


class InTurn(Preprocessor):
    """Several NumPy preprocessors, one after the other; ART's PyTorch classifier takes one such and no more.

    The backward pass is theirs, the last one's first: the identity for those that are not differentiable.

    Args:
        steps: the preprocessors.
    """

    params = ["steps"]

    def __init__(self, steps: Sequence[Preprocessor], apply_fit: bool = False, apply_predict: bool = True) -> None:
        super().__init__(is_fitted=True, apply_fit=apply_fit, apply_predict=apply_predict)
        self.steps = list(steps)

    def __call__(self, x: np.ndarray, y: Any | None = None) -> tuple[np.ndarray, Any | None]:
        """``x`` (N, ...) through every step, in its own dtype: ART's feature squeezing makes float64 of float32."""
        result = x
        for step in self.steps:
            result, y = step(result, y)
        return result.astype(x.dtype, copy=False), y

    def estimate_gradient(self, x: np.ndarray, grad: np.ndarray) -> np.ndarray:
        """The gradient through every step, each at the images it saw."""
        inputs = [x]
        for step in self.steps[:-1]:
            inputs.append(step(inputs[-1])[0])
        for step, seen in zip(reversed(self.steps), reversed(inputs), strict=True):
            grad = step.estimate_gradient(seen, grad)
        return grad


def preprocessor(steps: Sequence[Step], **common: Any) -> Preprocessor | None:
    """The preprocessor that ``steps`` describe, or None for none.

    Args:
        steps: import paths of preprocessor classes with their arguments.
        common: arguments for every class that takes them and does not have them from its step.

    Raises:
        ValueError: for a path that leads to no class, or arguments that it does not take.
    """
    made = [_one(path, arguments, common) for path, arguments in steps]
    return made[0] if len(made) == 1 else InTurn(made) if made else None


def takes(path: str) -> frozenset[str]:
    """The names of the arguments of the class at an import path.

    Raises:
        ValueError: for a path that leads to nothing.
    """
    return frozenset(inspect.signature(_imported(path)).parameters)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"defence {path!r} cannot be imported: {error}") from None


def _one(path: str, arguments: Mapping[str, Any], common: Mapping[str, Any]) -> Preprocessor:
    shared = {key: value for key, value in common.items() if key in takes(path)}
    try:
        return _imported(path)(**shared | dict(arguments))
    except TypeError as error:
        raise ValueError(f"defence {path!r}: {error}") from None
