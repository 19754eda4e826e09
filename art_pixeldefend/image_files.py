"""Users' own images: a folder of image files, or a ``.npy`` or ``.npz`` array, read and written back in that form."""

from __future__ import annotations

import io
import re
import secrets
import shutil
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from art_pixeldefend.files import check_file, check_folder, write_atomically
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


def layout_of(name: str, images: np.ndarray, channels: Sequence[int] = (1, 3)) -> str:
    """The axes of uint8 images: ``"NHW"``, ``"NCHW"`` or ``"NHWC"``, C one of ``channels``.

    Raises:
        ValueError: naming the argument ``name``.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"{name} must be uint8 images (N, H, W[, C]), got {images.dtype} of shape {images.shape}")
    if images.ndim == 3:
        return "NHW"
    if images.shape[1] in channels:
        return "NCHW"
    if images.shape[3] in channels:
        return "NHWC"
    expected = " or ".join(map(str, channels))
    raise ValueError(f"{name} must have a number of channels that is {expected}, got shape {images.shape}")


def as_nchw(name: str, images: np.ndarray, channels: Sequence[int] = (1, 3)) -> np.ndarray:
    """uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W), C one of ``channels``, as (N, C, H, W).

    Raises:
        ValueError: naming the argument ``name``.
    """
    layout = layout_of(name, images, channels)
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
            arrays = dict(file)
    except (
        ValueError, OSError, EOFError, RuntimeError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise ValueError(f"{str(path)!r} is cut short, or holds more than plain arrays: {error}") from error
    except (MemoryError, OverflowError) as error:
        raise ValueError(f"{str(path)!r} says that it holds more than fits into memory: {error}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{str(path)!r} holds more than plain arrays: {name!r} is none")
    return arrays


def read_images(path: str | PathLike[str], channels: Sequence[int] = (1, 3)) -> ImageSet:
    """All images of a folder and its subfolders, or of a ``.npy`` or ``.npz`` file (its array ``x``, or its only one).

    Args:
        path: the folder or the file.
        channels: how many an array may have; image files are grey or RGB.

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
    layout, levels = layout_of(str(path), images, channels), as_nchw(str(path), images, channels)
    return ImageSet(levels, [str(i) for i in range(len(levels))], layout)


def check_target(path: str | PathLike[str], like: ImageSet) -> None:
    """Whether :func:`write_images` would take ``path``: to be asked before long work.

    Raises:
        ValueError: naming ``path``: of a folder, if something other than an empty folder is there; of an array, if a
            folder is, or the suffix is not ``.npy`` or ``.npz``; of either, if nothing can be written there.
    """
    if like.layout == "folder":
        check_folder(path)
        return
    if Path(path).suffix not in (".npy", ".npz"):
        raise ValueError(f"arrays are written to .npy or .npz files, got {str(path)!r}")
    check_file(path)


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
            # A photograph in JPEG may bring previews of itself along (MPO).
            if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
                raise ValueError(f"{frames} frames, where one image a file is expected")
            if _is_deep(image):
                raise ValueError("more than 8 bits a channel, convert it first")
            return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises all
        raise ValueError(f"{str(path)!r} cannot be read as an image: {error}") from error


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether an image that is not yet loaded has more than 8 bits a channel; Pillow cuts some of them in silence.

    A raw mode says so, as ``RGB;16B`` does; that of a bitmap with 16 bits a pixel is ``BGR;16``.
    """
    if image.mode.startswith(("I", "F")):
        return True
    return any(re.search(r"\b(?!BGR;)\w+;16", str(tile[3])) for tile in image.tile)


def _write_folder(path: Path, levels: np.ndarray, names: Sequence[str]) -> None:
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.mkdir()
        for image, name in zip(levels, names, strict=True):
            target = (partial / name).with_suffix(".png")  # lossless, whatever the source was
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(as_picture(image)).save(target)
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
