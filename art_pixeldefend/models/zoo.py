"""Loading models of any kind, by the name of a bundled one or by path."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from art_pixeldefend.models import checkpoint

if TYPE_CHECKING:
    from art_pixeldefend.models.base import ImageModel

    Model = TypeVar("Model", bound=ImageModel)

WEIGHTS = Path(__file__).parent / "weights"
KINDS = {  # kind of model: module and class, imported when a model of the kind is used
    "pixelcnnpp": ("art_pixeldefend.models.pixelcnnpp.model", "PixelCNNpp"),
    "score": ("art_pixeldefend.models.score", "ScoreModel"),
}


def class_of(kind: str) -> type[ImageModel]:
    """The class of models of this kind.

    Raises:
        ValueError: if there is none; the message lists the kinds.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    module, name = KINDS[kind]
    return getattr(import_module(module), name)


def kind_of(header: Mapping[str, Any]) -> str | None:
    """The kind of model in a file with this header; files older than kinds hold a PixelCNN++."""
    if "format" not in header and {"configuration", "provenance"} == set(header):
        return "pixelcnnpp"
    return header.get("kind")


def names(kind: str | None = None) -> list[str]:
    """Names of the bundled models, of one kind if ``kind`` is given."""
    files = sorted(WEIGHTS.glob("*.safetensors"), key=lambda file: file.stem)
    return [file.stem for file in files if kind in (None, kind_of(checkpoint.read_header(file)))]


def path(name: str, kind: str | None = None) -> Path:
    """The file of the bundled model ``name``; its model card is the ``.md`` file beside it.

    Raises:
        ValueError: if no model of that name, and of that kind, is bundled; the message lists those that are.
    """
    if name not in names(kind):
        raise ValueError(f"name must be one of {', '.join(names(kind))}, got {name!r}")
    return WEIGHTS / f"{name}.safetensors"


def load(name_or_path: str | PathLike[str], device: torch.device | str | None = None) -> ImageModel:
    """Load a model of any kind, in evaluation mode.

    Args:
        name_or_path: the name of a bundled model, or a file that :meth:`ImageModel.save` wrote.
        device: where the model goes; by default the current GPU, or the CPU on machines without one.

    Raises:
        ValueError: if the file is not a model.
        FileNotFoundError: if there is neither a bundled model of that name nor a file at that path.
    """
    bundled = isinstance(name_or_path, str) and name_or_path in names()
    file = path(str(name_or_path)) if bundled else Path(name_or_path)
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r} is neither a file nor a bundled model ({', '.join(names())})")
    kind = kind_of(checkpoint.read_header(file))
    if kind not in KINDS:
        raise ValueError(f"{str(file)!r} does not hold a model; its kind is {kind!r}")
    return class_of(kind).load(file).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def as_model(value: Any, cls: type[Model], device: torch.device | str | None = None, *, name: str = "model") -> Model:
    """Return a model of class ``cls`` as it is, or load one by name or path.

    Args:
        value: a model, the name of a bundled one, or a path.
        cls: the class that is needed.
        device: where a model that is loaded goes, as for :func:`load`; a model that is passed stays where it is.
        name: of the argument, for messages.

    Raises:
        ValueError: if it is not a model of that class; the message names the argument ``name``.
        FileNotFoundError: if it is a path without a file.
    """
    if isinstance(value, cls):
        return value
    expected = f"{name} must be a {cls.__name__}, the path of one, or one of {', '.join(names(cls.kind))}"
    if not isinstance(value, (str, PathLike)):
        raise ValueError(f"{expected}, got {type(value).__name__}")
    try:
        model = load(value, device)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{expected}, got {str(value)!r}: {error}") from error
    if not isinstance(model, cls):
        raise ValueError(f"{expected}, got {str(value)!r}, a {type(model).__name__}")
    return model
