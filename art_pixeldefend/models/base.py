"""The base class of image models: shape, configuration, provenance, files."""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from art_pixeldefend.models import checkpoint, zoo
from art_pixeldefend.precision import full_float32
from art_pixeldefend.validation import check_levels

_modes = threading.Lock()
_evaluating: WeakKeyDictionary[ImageModel, tuple[int, list[nn.Module]]] = WeakKeyDictionary()


class ImageModel(nn.Module):
    """A model of images of one shape that can be saved, loaded and told apart from others.

    A subclass sets ``kind``, is listed under it in :data:`art_pixeldefend.models.zoo.KINDS`, and keeps every argument
    of its constructor, which JSON must be able to represent, as an attribute of the same name. One of them is
    ``image_shape``.

    Attributes:
        kind: the name of the model family, stored in files.
        image_shape: (C, H, W).
        provenance: how the model was made (data, settings, versions, results); JSON-serialisable.
    """

    kind: ClassVar[str]
    image_shape: tuple[int, int, int]

    def __init__(self) -> None:
        super().__init__()
        self.provenance: dict[str, Any] = {}

    @property
    def configuration(self) -> dict[str, Any]:
        """The constructor's arguments, which build a model of this size again."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    @property
    def summary(self) -> str:
        """The constructor call that builds a model of this size, in one line."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.configuration.items())})"

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the parameters."""
        return next(self.parameters()).dtype

    def as_levels(self, x: Tensor | np.ndarray, name: str = "x") -> Tensor:
        """Check that ``x`` is a batch of levels 0..255 and return it as a uint8 tensor on the model's device.

        Raises:
            ValueError: if ``x`` is not a batch of levels of the model's image shape; the message calls it ``name``.
        """
        return check_levels(name, x, self.image_shape).to(self.device)

    def initialise(self, x: Tensor | np.ndarray) -> None:
        """Initialise the model from levels ``x`` (N, C, H, W) of training images; by default nothing is done."""

    def loss(self, x: Tensor) -> Tensor:
        """The training loss of levels ``x`` (N, C, H, W), uint8, a scalar; see :func:`.training.train`."""
        raise NotImplementedError(f"{type(self).__name__} has no training loss of its own")

    def evaluate(self, x: Tensor) -> dict[str, float]:
        """Means over held-out images, levels ``x`` (N, C, H, W), of named measures of quality; by default none."""
        return {}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, and float32 in full precision on any device, for the duration of the context.

        Modes and settings are restored at the end; where several threads are inside, by the last one to leave.
        """
        with _modes:
            inside, training = _evaluating.get(self, (0, []))
            found = [module for module in self.modules() if module.training]
            for module in found:
                module.training = False
            _evaluating[self] = inside + 1, training + found
        try:
            with full_float32():
                yield
        finally:
            with _modes:
                inside, training = _evaluating.pop(self)
                if inside > 1:
                    _evaluating[self] = inside - 1, training
                else:
                    for module in training:
                        module.training = True

    def fingerprint(self) -> str:
        """A SHA-256 of configuration and parameters: two models of equal fingerprints compute the same function."""
        digest = hashlib.sha256(repr(self.configuration).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write a safetensors file with kind, configuration and provenance in its header, atomically.

        An existing file is replaced.

        Args:
            path: the file to write.
            dtype: store floating-point tensors in this type; default: as they are. ``torch.float16`` halves the file
                and changes the mean bits/dim of the bundled density models by less than 0.0005.

        Raises:
            TypeError: if ``provenance`` holds values that JSON cannot represent.
            ValueError: if a weight is NaN or infinite, or becomes so in ``dtype``.
            OSError: if the file cannot be written.
        """
        tensors = self.state_dict()
        if dtype is not None:
            tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        _check_finite(tensors)
        header = {"kind": self.kind, "configuration": self.configuration, "provenance": self.provenance}
        checkpoint.write(path, tensors, header)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a model that :meth:`save` wrote: float32, in evaluation mode, on the CPU. Nothing is unpickled.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated or corrupted, holds something else, or has NaN or infinite weights.
        """
        tensors, header = checkpoint.read(path)
        try:
            if (kind := zoo.kind_of(header)) != cls.kind:
                raise ValueError(f"its kind is {kind!r}, not {cls.kind!r}")
            model = cls.from_tensors(header["configuration"], tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"path {str(path)!r} is not a {cls.__name__} model: {error}") from error
        model.provenance = header.get("provenance", {})
        return model

    @classmethod
    def from_tensors(cls, configuration: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Build a model of this configuration with these weights: float32, in evaluation mode, on the CPU.

        Raises:
            TypeError, ValueError, RuntimeError: if they do not fit, or hold NaN or infinite weights.
        """
        _check_finite(tensors)
        # Initial weights are drawn and overwritten; neither modes nor random generators of the caller take part.
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model = cls(**configuration).to(torch.float32)
            model.load_state_dict(tensors)
        return model.eval()

    @classmethod
    def from_pretrained(cls, name: str) -> Self:
        """Load a bundled model by name; :func:`art_pixeldefend.models.zoo.names` lists them.

        Raises:
            ValueError: if no model of that name and kind is bundled; the message lists those that are.
        """
        return cls.load(zoo.path(name, cls.kind))


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode of a module and of all its parts; the modes of before are restored at the end."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values")
