"""Models that come with the package, by name."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from art_pixeldefend.models.pixelcnnpp import PixelCNNpp

WEIGHTS = Path(__file__).parent / "weights"


def names() -> list[str]:
    """The bundled models."""
    return sorted(file.stem for file in WEIGHTS.glob("*.safetensors"))


def path(name: str) -> Path:
    """Where the weights of the bundled model ``name`` are; its card is the ``.md`` file beside them.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in names():
        raise ValueError(f"name must be a bundled model ({', '.join(names())}), got {name!r}")
    return WEIGHTS / f"{name}.safetensors"


def as_pixel_cnn(pixel_cnn: Any, device: torch.device | None = None, *, name: str = "pixel_cnn") -> PixelCNNpp:
    """A model as it is; else the bundled model of that name, or the model in the file at that path.

    Args:
        pixel_cnn: the model, a name, or a path.
        device: where a model that is loaded goes; the current GPU where there is one.
        name: of the argument, for errors.

    Raises:
        ValueError: naming the argument ``name``.
        FileNotFoundError: if it is a path without a file.
    """
    from art_pixeldefend.models.pixelcnnpp import PixelCNNpp

    if isinstance(pixel_cnn, PixelCNNpp):
        return pixel_cnn
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(pixel_cnn, str) and pixel_cnn in names():
        return PixelCNNpp.from_pretrained(pixel_cnn).to(device)
    expected = f"{name} must be a PixelCNNpp, the path of one, or one of {', '.join(names())}"
    if not isinstance(pixel_cnn, (str, PathLike)):
        raise ValueError(f"{expected}, got {type(pixel_cnn).__name__}")
    if not Path(pixel_cnn).is_file():
        raise FileNotFoundError(f"{expected}, got {str(pixel_cnn)!r}")
    return PixelCNNpp.load(pixel_cnn).to(device)
