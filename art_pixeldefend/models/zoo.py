"""Loading models of any kind, by the name of a bundled one or by path."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from art_pixeldefend.files import METRICS, MODEL
from art_pixeldefend.models import checkpoint
from art_pixeldefend.models.checkpoint import RUN
from art_pixeldefend.validation import check_choice, check_device

if TYPE_CHECKING:
    from art_pixeldefend.models.base import ImageModel

    Model = TypeVar("Model", bound=ImageModel)

WEIGHTS = Path(__file__).parent / "weights"
KINDS = {  # kind of model: module and class, imported when a model of the kind is used
    "pixelcnnpp": ("art_pixeldefend.models.pixelcnnpp.model", "PixelCNNpp"),
    "score": ("art_pixeldefend.models.score", "ScoreModel"),
    "vae": ("art_pixeldefend.models.generator", "VAE"),
}


def class_of(kind: str) -> type[ImageModel]:
    """The class of models of this kind.

    Raises:
        ValueError: if there is none; the message lists the kinds.
    """
    check_choice("kind", kind, KINDS)
    module, name = KINDS[kind]
    return getattr(import_module(module), name)


def kind_of(header: Mapping[str, Any]) -> str | None:
    """The kind of model in a file with this header; files older than kinds hold a PixelCNN++."""
    if "format" not in header and {"configuration", "provenance"} == set(header):
        return "pixelcnnpp"
    return header.get("kind")


def is_run(header: Mapping[str, Any]) -> bool:
    """Whether a file with this header is the checkpoint of a training run; version 0.1.0 had no kinds."""
    return header.get("kind") == RUN or {"step", "settings"} <= set(header)


def names(kind: str | None = None) -> list[str]:
    """Names of the bundled models, of one kind if ``kind`` is given."""
    files = sorted(WEIGHTS.glob("*.safetensors"), key=lambda file: file.stem)
    return [file.stem for file in files if kind in (None, kind_of(checkpoint.read_header(file)))]


def path(name: str, kind: str | None = None) -> Path:
    """The file of the bundled model ``name``; its model card is the ``.md`` file beside it.

    Raises:
        ValueError: if no model of that name, and of that kind, is bundled; the message lists those that are.
    """
    check_choice("name", name, names(kind))
    return WEIGHTS / f"{name}.safetensors"


def load(name_or_path: str | PathLike[str], device: torch.device | str | None = None) -> ImageModel:
    """Load a model of any kind, in evaluation mode.

        >>> from art_pixeldefend.models import zoo
        >>> "digits" in zoo.names(kind="pixelcnnpp")
        True
        >>> model = zoo.load("digits", device="cpu")
        >>> type(model).__name__, model.image_shape, model.provenance["training_images"]
        ('PixelCNNpp', (1, 8, 8), 1397)

    Args:
        name_or_path: the name of a bundled model, or a file that :meth:`ImageModel.save` wrote.
        device: where the model goes; by default the current GPU, or the CPU on machines without one.

    Raises:
        ValueError: if there is something else at the path; the message says what it is. If ``device`` does not exist.
        FileNotFoundError: if there is neither a bundled model of that name nor a file at that path.
    """
    place = check_device("device", device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bundled = isinstance(name_or_path, str) and name_or_path in names()
    file = path(str(name_or_path)) if bundled else Path(name_or_path)
    if not file.exists():
        raise FileNotFoundError(f"{str(file)!r} is neither a file nor one of {', '.join(names())}")
    if reason := _unlike_a_model(file):
        raise ValueError(f"{str(file)!r} is {reason}")
    model_class = class_of(str(kind_of(checkpoint.read_header(file))))
    with torch.inference_mode(False):
        return model_class.load(file).to(place)


def _unlike_a_model(file: Path) -> str | None:
    """What is at a path, if it can be recognised as something else than a model."""
    run = file if file.is_dir() else file.parent
    model = f"its model is {str(run / MODEL)!r}" if (run / MODEL).is_file() else "it has not finished"
    if file.is_dir():
        return f"the folder of a training run; {model}" if (file / METRICS).is_file() else "a folder"
    with file.open("rb") as opened:
        is_zip = opened.read(4) == b"PK\x03\x04"
    if file.suffix in (".pth", ".pt", ".ckpt", ".pkl", ".pickle", ".bin") or (is_zip and file.suffix != ".npz"):
        return "a PyTorch or pickle file, which could run code if it was loaded; PixelCNNpp.save writes model files"
    header = checkpoint.read_header(file)
    if is_run(header):
        return f"the checkpoint of a training run, which train --resume continues; {model}"
    kind = kind_of(header) or ("classifier" if "network" in header else None)
    return None if kind in KINDS else f"of kind {kind!r}, not a model of images"


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
    if not isinstance(value, (str, PathLike)):
        raise ValueError(f"{_expected(name, cls)}, got {type(value).__name__}")
    try:
        model = load(value, device)
    except FileNotFoundError:
        raise FileNotFoundError(f"{_expected(name, cls)}; there is no file {str(value)!r}") from None
    except ValueError as error:
        raise ValueError(f"{_expected(name, cls)}: {error}") from error
    if not isinstance(model, cls):
        raise ValueError(f"{_expected(name, cls)}, got {str(value)!r}, a {type(model).__name__}")
    return model


def _expected(name: str, cls: type[ImageModel]) -> str:
    """What :func:`as_model` accepts, for messages."""
    bundled = ", ".join(model for kind in KINDS if issubclass(class_of(kind), cls) for model in names(kind))
    choices = f", the path of one, or one of {bundled}" if bundled else " or the path of one"
    return f"{name} must be a {cls.__name__}{choices}"
