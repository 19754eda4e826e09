"""ART preprocessors from plain data: import paths and arguments of one or several classes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from art.defences.preprocessor import Preprocessor, SpatialSmoothing
from numpy.lib.stride_tricks import sliding_window_view

Step = tuple[str, Mapping[str, Any]]  # import path of a preprocessor class, its arguments
CALIBRATED = "{calibrated}"  # an argument that the defence's ``calibrate`` chooses


class Sequential(Preprocessor):
    """Chain NumPy preprocessors; ART's ``PyTorchClassifier`` accepts only one.

    The backward pass goes through the preprocessors in reverse; it is the identity for those without a gradient.

    Args:
        steps: the preprocessors.

    Example:
        >>> from art.defences.preprocessor import FeatureSqueezing, SpatialSmoothing
        >>> squeezing = Sequential([FeatureSqueezing(clip_values=(0, 1), bit_depth=3), SpatialSmoothing(window_size=2)])
        >>> squeezing(np.zeros((2, 8, 8, 1), np.float32))[0].dtype
        dtype('float32')
    """

    params = ["steps"]

    def __init__(self, steps: Sequence[Preprocessor], apply_fit: bool = False, apply_predict: bool = True) -> None:
        super().__init__(is_fitted=True, apply_fit=apply_fit, apply_predict=apply_predict)
        self.steps = list(steps)

    def __call__(self, x: np.ndarray, y: Any | None = None) -> tuple[np.ndarray, Any | None]:
        """Apply every step to ``x`` (N, ...); the dtype is kept, where ART's feature squeezing returns float64."""
        result = x
        for step in self.steps:
            result, y = step(result, y)
        return result.astype(x.dtype, copy=False), y

    def estimate_gradient(self, x: np.ndarray, grad: np.ndarray) -> np.ndarray:
        """Pass the gradient through every step, the last one first, each at its own input."""
        inputs = [x]
        for step in self.steps[:-1]:
            inputs.append(step(inputs[-1])[0])
        for step, seen in zip(reversed(self.steps), reversed(inputs), strict=True):
            grad = step.estimate_gradient(seen, grad)
        return grad

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(description, self.steps))})"


class MedianSmoothing(SpatialSmoothing):
    """ART's spatial smoothing, a median filter, with its exact gradient, for white-box attacks.

    The gradient of a window's median goes to the pixel that is the median, in equal parts to several equal ones.
    ART's class has the identity as its gradient; its version for PyTorch needs the package kornia.

    Args:
        window_size, channels_first, clip_values, apply_fit, apply_predict: as in ART's ``SpatialSmoothing``.

    Example:
        >>> smoothing = MedianSmoothing(window_size=2, channels_first=True)
        >>> smoothing.estimate_gradient(np.array([[[[0.1, 0.3], [0.2, 0.4]]]]), np.array([[[[0.0, 0.0], [0.0, 1.0]]]]))
        array([[[[0., 1.],
                 [0., 0.]]]])
    """

    def estimate_gradient(self, x: np.ndarray, grad: np.ndarray) -> np.ndarray:
        """The gradient with respect to images ``x`` (N, C, H, W) or (N, H, W, C) from that of the smoothed ones.

        ``grad`` is of the shape of ``x``, or (N, K, ...) for K functions of them, as ART's ``class_gradient`` has it.
        """
        if grad.ndim > x.ndim:
            return np.stack([self.estimate_gradient(x, grad[:, k]) for k in range(grad.shape[1])], axis=1)
        size, axes = self.window_size, (2, 3) if self.channels_first else (1, 2)
        padding = [(size // 2, (size - 1) // 2) if axis in axes else (0, 0) for axis in range(x.ndim)]
        pixels = np.pad(np.arange(x.size).reshape(x.shape), padding, mode="symmetric")  # SciPy's "reflect"
        windows = sliding_window_view(pixels, (size, size), axis=axes).reshape(x.size, size**2)
        values = x.ravel()[windows]
        is_median = values == np.sort(values, axis=1)[:, size**2 // 2, None]
        shares = is_median * (grad.ravel() / is_median.sum(axis=1))[:, None]
        return np.bincount(windows.ravel(), shares.ravel(), x.size).reshape(x.shape).astype(grad.dtype)


def description(value: Any) -> str:
    """The representation of a module or preprocessor, equal for equal arguments in all processes.

    Example:
        >>> from art.defences.preprocessor import SpatialSmoothing
        >>> description(SpatialSmoothing(window_size=2))
        'SpatialSmoothing(window_size=2, channels_first=False, clip_values=None)'
    """
    text = repr(value)
    if type(value).__repr__ is object.__repr__ and isinstance(value, Preprocessor):
        arguments = ", ".join(f"{name}={getattr(value, name, None)!r}" for name in value.params)
        text = f"{type(value).__name__}({arguments})"
    return re.sub(" at 0x[0-9a-f]+", "", text)


def preprocessor(steps: Sequence[Step]) -> Preprocessor | None:
    """Return the preprocessor that ``steps`` describe, or None if there are none.

    Raises:
        ValueError: for an import path without a class, or arguments that the class does not accept.
    """
    made = [_one(path, arguments) for path, arguments in steps]
    return made[0] if len(made) == 1 else Sequential(made) if made else None


def is_placeholder(value: Any) -> bool:
    """Whether an argument is a string in braces, such as ``"{name}"``."""
    return isinstance(value, str) and value.startswith("{") and value.endswith("}")


def placeholders(steps: Sequence[Step]) -> set[str]:
    """Return the placeholders among the arguments of ``steps``."""
    return {value for _, arguments in steps for value in arguments.values() if is_placeholder(value)}


def _one(path: str, arguments: Mapping[str, Any]) -> Preprocessor:
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"defence {path!r} cannot be imported: {error}") from None
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"defence {path!r}: {error}") from None
