"""Argument checks, whose errors name the argument and what was expected; parameters set all together or not at all."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

LEVELS = 256

T = TypeVar("T")


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """``value`` as an int of at least ``least`` and at most ``most``.

    Raises:
        ValueError: naming the argument ``name``.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}") from None
    if count < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {count}")
    if most is not None and count > most:
        raise ValueError(f"{name} must be an integer of at most {most}, got {count}")
    return count


def check_number(name: str, value: Any, low: float = 0.0, high: float = math.inf) -> float:
    """``value`` as a float in low..high.

    Raises:
        ValueError: naming the argument ``name``.
    """
    number = _as_float(value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be a number between {low:g} and {high:g}, got {value!r}")
    return number


def check_probability(name: str, value: Any) -> float:
    """``value`` as a float in [0, 1).

    Raises:
        ValueError: naming the argument ``name``.
    """
    number = _as_float(value)
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be a probability in [0, 1), got {value!r}")
    return number


def check_rate(name: str, value: Any) -> float:
    """``value`` as a float in (0, 1], the error rate of a test.

    Raises:
        ValueError: naming the argument ``name``.
    """
    rate = check_number(name, value, high=1.0)
    if not rate:
        raise ValueError(f"{name} must be above 0, or no image is ever flagged, got 0")
    return rate


def check_bool(name: str, value: Any) -> bool:
    """``value``, True or False.

    Raises:
        ValueError: naming the argument ``name``.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be a bool, got {value!r}")
    return value


def check_choice(name: str, value: T, choices: Iterable[T]) -> T:
    """``value``, one of ``choices``.

    Raises:
        ValueError: naming the argument ``name``.
    """
    if value not in (known := list(choices)):
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
    return value


def check_seed(name: str, value: Any) -> int | None:
    """``value`` as a seed that may be None: an int of at least 0.

    Raises:
        ValueError: naming the argument ``name``.
    """
    return None if value is None else check_count(name, value, least=0)


def check_eps(name: str, value: Any) -> int:
    """``value`` as a radius in levels: an integer, or a float without a fraction, in 0..255.

    Raises:
        ValueError: naming the argument ``name``.
    """
    try:
        whole = int(value) if not isinstance(value, (bool, str)) and int(value) == value else None
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or not 0 <= whole < LEVELS:
        raise ValueError(f"{name} must be a whole number of levels in 0..255, got {value!r}")
    return whole


def check_image_shape(value: Any) -> tuple[int, int, int]:
    """``value`` as an image shape (C, H, W): three positive integers.

    Raises:
        ValueError: naming ``image_shape``.
    """
    try:
        shape = tuple(check_count("image_shape", size) for size in value)
    except (TypeError, ValueError):
        shape = ()
    if len(shape) != 3:
        raise ValueError(f"image_shape must be three positive integers (C, H, W), got {value!r}")
    return shape


def check_device(name: str, value: Any) -> torch.device:
    """``value`` as a device of this machine.

    Raises:
        ValueError: naming the argument ``name``.
    """
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:  # the kind depends on the backend
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} must be an available device, such as cpu, cuda or cuda:1, got {value!r}: {reason}"
        ) from None
    return device


def check_levels(name: str, x: Any, image_shape: tuple[int, int, int]) -> Tensor:
    """``x`` as a uint8 tensor (N, C, H, W) of 8-bit levels, on the device that it is on.

    Raises:
        ValueError: naming the argument ``name``, for images of another shape than ``image_shape``, or for values that
            are not integers in 0..255.
    """
    try:
        x = x if isinstance(x, Tensor) else _as_tensor(x)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be an array or tensor of levels, got {type(x).__name__}") from None
    if x.ndim != 4 or tuple(x.shape[1:]) != tuple(image_shape):
        expected = ", ".join(map(str, image_shape))
        raise ValueError(f"{name} must be of shape (N, {expected}), got {tuple(x.shape)}")
    if x.dtype == torch.uint8:
        return x
    if x.dtype == torch.bool or x.is_complex():
        raise ValueError(f"{name} must hold integer levels in 0..255, got dtype {x.dtype}")
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch cannot compare them
        x = x.to(torch.int64)
    if x.is_floating_point() and not bool((x == x.round()).all()):  # also false for NaN
        raise ValueError(f"{name} must hold integer levels in 0..255, got fractions or NaN")
    if x.numel() and not (x.min() >= 0 and x.max() < LEVELS):
        raise ValueError(f"{name} must hold integer levels in 0..255, got {x.min().item()} to {x.max().item()}")
    return x.to(torch.uint8)


def check_labels(name: str, y: Any, count: int | None = None) -> np.ndarray:
    """Class numbers (N,), int64, of labels given as class numbers (N,) or (N, 1), or one-hot (N, classes).

    Raises:
        ValueError: naming the argument ``name``, for labels of another form, or a number other than ``count``.
    """
    try:
        labels = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y)
    except (TypeError, ValueError):  # lists of different lengths
        labels = np.empty((), object)
    given = f"{labels.dtype} of shape {labels.shape}"
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    elif labels.ndim == 2 and labels.dtype.kind in "biuf" and _is_one_hot(labels):
        labels = labels.argmax(axis=1)
    valid = labels.ndim == 1 and labels.dtype.kind in "iu" and not (labels < 0).any()
    if not valid or len(labels) != (len(labels) if count is None else count):
        expected = "" if count is None else f"{count} "
        raise ValueError(f"{name} must be {expected}class numbers or one-hot rows, got {given}")
    return labels.astype(np.int64)


def check_attributes(holder: Any, check: Callable[..., Any], *names: str, **limits: Any) -> None:
    """Replace attributes of ``holder`` by what ``check`` returns for them.

    Args:
        holder: the object.
        check: a function of a name and a value, such as :func:`check_count`.
        names: of the attributes.
        limits: further arguments of ``check``.

    Raises:
        ValueError: as ``check``; attributes before the one it names are replaced.
    """
    for name in names:
        object.__setattr__(holder, name, check(name, getattr(holder, name), **limits))  # also of frozen dataclasses


@contextmanager
def all_or_none(holder: Any) -> Iterator[None]:
    """Restore the attributes of ``holder`` if the body of the context raises."""
    before = dict(vars(holder))
    try:
        yield
    except BaseException:
        vars(holder).clear()
        vars(holder).update(before)
        raise


def _is_one_hot(labels: np.ndarray) -> bool:
    return bool(np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all())


def _as_float(value: Any) -> float:
    """``value`` as a float, NaN if it is not a real number."""
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan


def _as_tensor(x: Any) -> Tensor:
    """An array of any byte order and strides as a tensor; read-only arrays are copied, torch warns about them."""
    x = np.asarray(x)
    return torch.from_numpy(np.require(x, x.dtype.newbyteorder("="), requirements=("C", "W")))
