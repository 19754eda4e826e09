"""Users' own images: a folder of image files, or a ``.npy`` or ``.npz`` array, read and written back in that form."""

from __future__ import annotations

import io
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from art_pixeldefend.files import write_atomically
from art_pixeldefend.pictures import as_picture

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageSet:
    """Images and where they came from.

    Args:
        levels: (N, C, H, W), uint8.
        names: a name for each: its path within the folder, or its number in the array.
        layout: axes of the source, ``"NHW"``, ``"NHWC"``, ``"NCHW"``, or ``"folder"``.
    """

    levels: np.ndarray
    names: Sequence[str]
    layout: str


def layout_of(name: str, images: np.ndarray) -> str:
    """The axes of uint8 images: ``"NHW"``, ``"NCHW"`` or ``"NHWC"``, C 1 or 3.

    Raises:
        ValueError: naming the argument ``name``.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"{name} must be uint8 images (N, H, W[, C]), got {images.dtype} of shape {images.shape}")
    if images.ndim == 3:
        return "NHW"
    if images.shape[1] in (1, 3):
        return "NCHW"
    if images.shape[3] in (1, 3):
        return "NHWC"
    raise ValueError(f"{name} must have 1 or 3 channels, got shape {images.shape}")


def as_nchw(name: str, images: np.ndarray) -> np.ndarray:
    """uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W), C 1 or 3, as (N, C, H, W).

    Raises:
        ValueError: naming the argument ``name``.
    """
    layout = layout_of(name, images)
    if layout == "NHW":
        return images[:, None]
    return np.ascontiguousarray(np.moveaxis(images, -1, 1)) if layout == "NHWC" else images


def read_arrays(path: str | PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz``, or the one of a ``.npy`` as ``x``. Nothing is unpickled.

    Raises:
        ValueError: naming the file, if it is cut short or holds anything but plain arrays.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"x": loaded}
        with loaded as file:
            return dict(file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise ValueError(f"{str(path)!r} is cut short, or holds more than plain arrays: {error}") from error


def read_images(path: str | PathLike[str]) -> ImageSet:
    """All images of a folder and its subfolders, or of a ``.npy`` or ``.npz`` file (its array ``x``, or its only one).

    Raises:
        ValueError: naming the file: missing, unreadable, of another size than the others, or no images.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if path.suffix not in (".npy", ".npz") or not path.is_file():
        raise ValueError(f"expected a folder of images, or a .npy or .npz file, got {str(path)!r}")
    arrays = read_arrays(path)
    if "x" not in arrays and len(arrays) != 1:
        raise ValueError(f"{str(path)!r} must hold an array x, or a single one, got {sorted(arrays) or 'none'}")
    images = arrays["x"] if "x" in arrays else next(iter(arrays.values()))
    names = [str(i) for i in range(len(images))]
    return ImageSet(as_nchw(str(path), images), names, layout_of(str(path), images))


def check_target(path: str | PathLike[str], like: ImageSet) -> None:
    """Whether :func:`write_images` would take ``path``: to be asked before long work.

    Raises:
        ValueError: if a folder of that name exists already and is not empty, or an array file has another suffix than
            ``.npy`` and ``.npz``.
    """
    path = Path(path)
    if like.layout != "folder" and path.suffix not in (".npy", ".npz"):
        raise ValueError(f"arrays are written to .npy or .npz files, got {str(path)!r}")
    if like.layout == "folder" and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{str(path)!r} exists already and is not an empty folder")


def write_images(path: str | PathLike[str], levels: np.ndarray, like: ImageSet) -> None:
    """Write levels (N, C, H, W) in the form of the set they were made from: PNG files of the same names, or an array.

    Raises:
        ValueError: as :func:`check_target` does.
        OSError: if it cannot be written; nothing partial is left.
    """
    path = Path(path)
    check_target(path, like)
    if like.layout == "folder":
        _write_folder(path, levels, like.names)
        return
    arrays = {"NHW": levels[:, 0], "NHWC": np.moveaxis(levels, 1, -1), "NCHW": levels}
    buffer = io.BytesIO()
    if path.suffix == ".npz":
        np.savez_compressed(buffer, x=arrays[like.layout])
    else:
        np.save(buffer, arrays[like.layout])
    write_atomically(path, buffer.getvalue())


def _read_folder(folder: Path) -> ImageSet:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{str(folder)!r} holds no images ({', '.join(SUFFIXES)})")
    named = {path.with_suffix(""): path for path in reversed(paths)}
    for path in paths:
        if (other := named[path.with_suffix("")]) != path:
            raise ValueError(f"{str(other)!r} and {str(path)!r} differ by their suffix only: one name an image")
    images = [_read_file(path) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.size != images[0].size:
            raise ValueError(f"{str(path)!r} is {image.size}, but {str(paths[0])!r} is {images[0].size}: one size only")
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    levels = as_nchw(str(folder), np.stack([np.asarray(image.convert(mode)) for image in images]))
    return ImageSet(levels, [str(path.relative_to(folder)) for path in paths], "folder")


def _read_file(path: Path) -> Image.Image:
    """As grey if the file is, as RGB otherwise."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{str(path)!r} has more than 8 bits a channel (mode {image.mode}): convert it first")
            return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as an image: {error}") from error


def _write_folder(path: Path, levels: np.ndarray, names: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        partial.chmod(0o755)
        for image, name in zip(levels, names, strict=True):
            target = (partial / name).with_suffix(".png")  # lossless, whatever the source was
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(as_picture(image)).save(target)
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
