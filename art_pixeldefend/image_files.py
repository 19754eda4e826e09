"""Read and write sets of images: a folder of image files, or a ``.npy`` or ``.npz`` array."""

from __future__ import annotations

import io
import os
import re
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from art_pixeldefend.files import (
    CHECKPOINT,
    METRICS,
    MODEL,
    SAMPLES,
    check_file,
    check_folder,
    replacing,
    write_atomically,
)
from art_pixeldefend.pictures import as_picture

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
WRITTEN_AS = ".png"  # lossless


@dataclass(frozen=True)
class ImageSet:
    """Images and the form in which they were read.

    Args:
        levels: (N, C, H, W), uint8.
        names: one for each image: its path within the folder, or its index in the array.
        layout: axes of the source, ``"NHW"``, ``"NHWC"``, ``"NCHW"``, or ``"folder"``.
        source: the folder or file they were read from, if any.
        total: the number of images in the source, if it holds others.
    """

    levels: np.ndarray
    names: Sequence[str]
    layout: str
    source: Path | None = None
    total: int | None = None


@dataclass(frozen=True)
class LazyImages:
    """Images that are read when they are needed.

    Args:
        names: one for each image, as in :class:`ImageSet`.
        read: returns the levels (M, C, H, W), uint8, of the images from one position up to another.
    """

    names: Sequence[str]
    read: Callable[[int, int], np.ndarray]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Levels of at most ``size`` images at a time, in order.

        Raises:
            ValueError: as :func:`read_images`, when the file that causes it is reached.
        """
        for start in range(0, len(self.names), size):
            yield self.read(start, min(start + size, len(self.names)))


def layout_of(name: str, images: np.ndarray, channels: Sequence[int] = (1, 3)) -> str:
    """The axes of uint8 images: ``"NHW"``, ``"NCHW"`` or ``"NHWC"``, C one of ``channels``.

    Raises:
        ValueError: naming the argument ``name``.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        floats = "; convert values of 0 to 1 by np.rint(255 * x).astype(np.uint8)" if images.dtype.kind == "f" else ""
        raise ValueError(
            f"{name} must be uint8 images (N, C, H, W), (N, H, W, C) or (N, H, W), got {images.dtype} of shape "
            f"{images.shape}{floats}"
        )
    if images.ndim == 3 and 1 in channels:
        return "NHW"
    if images.ndim == 4 and images.shape[1] in channels:
        return "NCHW"
    if images.ndim == 4 and images.shape[3] in channels:
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
    """The arrays of an ``.npz`` file, or the array of a ``.npy`` file under the name ``x``. Nothing is unpickled.

    Raises:
        ValueError: naming the file, if it is truncated or holds anything but plain arrays.
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
        raise ValueError(f"{str(path)!r} is truncated, or holds more than plain arrays: {error}") from error
    except (MemoryError, OverflowError) as error:
        raise ValueError(f"{str(path)!r} declares arrays that do not fit into memory: {error}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{str(path)!r} holds {name!r}, which is not a plain array")
    return arrays


def read_images(
    path: str | PathLike[str], channels: Sequence[int] = (1, 3), *, exclude: str | PathLike[str] | None = None
) -> ImageSet:
    """Read the images of a folder and its subfolders, or the array of a ``.npy`` or ``.npz`` file.

    An ``.npz`` file must hold an array ``x`` or a single array. In a folder, files with an image suffix are read, in
    the order of their names. Symbolic links are followed; hidden files and folders, and the run folders of ``train``,
    are skipped. Orientations in EXIF data are applied. Images are RGB unless all of them are grey or ``channels``
    decides.

    Args:
        path: the folder or the file.
        channels: the numbers of channels to accept. If only 1 is, RGB files whose channels are equal are read as grey;
            if only 3 is, grey files are read as RGB.
        exclude: a folder inside ``path`` that is not read, because results will be written there.

    Raises:
        ValueError: naming the file: missing, unreadable, of another size than the others, with transparent pixels, in
            colour where grey is expected, or not images.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, channels, exclude)
    if path.suffix not in (".npy", ".npz") or not path.is_file():
        found = "is not" if path.exists() else "does not exist; expected"
        raise ValueError(f"{str(path)!r} {found} a folder of images, or a .npy or .npz file")
    arrays = read_arrays(path)
    if "x" not in arrays and len(arrays) != 1:
        raise ValueError(f"{str(path)!r} must hold an array x, or a single array, got {sorted(arrays) or 'none'}")
    images = arrays["x"] if "x" in arrays else next(iter(arrays.values()))
    layout, levels = layout_of(str(path), images, channels), as_nchw(str(path), images, channels)
    return ImageSet(levels, [str(i) for i in range(len(levels))], layout, path)


def open_images(path: str | PathLike[str], channels: int) -> LazyImages:
    """Find the images that :func:`read_images` reads, without reading them.

    Files of a folder are read one by one, a ``.npy`` file is mapped into memory, and an ``.npz`` file is read whole.

    Args:
        path: as for :func:`read_images`.
        channels: the number of channels that images must have.

    Raises:
        ValueError: as :func:`read_images`; for single files of a folder when they are read.
    """
    path = Path(path)
    if path.is_dir():
        paths = _listed(path, (channels,))

        @cache
        def size() -> tuple[int, int]:
            return _read_file(paths[0]).size

        def read(start: int, stop: int) -> np.ndarray:
            return _levels_of(paths[start:stop], channels == 1, paths[0], size() if start else None)

        return LazyImages([str(file.relative_to(path)) for file in paths], read)
    if path.suffix == ".npy" and path.is_file():
        with suppress(ValueError, OSError, EOFError):  # read_images says what is wrong
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            layout_of(str(path), mapped, (channels,))
            names = [str(i) for i in range(len(mapped))]
            return LazyImages(names, lambda start, stop: as_nchw(str(path), mapped[start:stop], (channels,)).copy())
    found = read_images(path, (channels,))
    return LazyImages(found.names, lambda start, stop: found.levels[start:stop])


def check_target(path: str | PathLike[str], like: ImageSet, *, overwrite: bool = False) -> None:
    """Check that :func:`write_images` can write to ``path``; meant for before a long computation.

    A folder inside the one that the images come from is accepted with a warning: it will be read as a part of that.

    Raises:
        ValueError: naming ``path``, if it exists and may not be overwritten, holds the images that were read, cannot be
            written, or has another suffix than ``.npy`` or ``.npz`` where an array is to be written; or naming two
            images that would be written to the same file.
    """
    path = Path(path)
    if like.layout != "folder":
        if path.suffix not in (".npy", ".npz"):
            raise ValueError(f"arrays are written to .npy or .npz files, got {str(path)!r}")
        check_file(path, overwrite=overwrite)
        return
    source, target = like.source and like.source.resolve(), path.resolve()
    if source and source.is_relative_to(target):
        raise ValueError(f"{str(path)!r} holds the images that are read; choose another folder")
    if source and target.is_relative_to(source):
        warnings.warn(
            f"{str(path)!r} is inside the folder of the images: later commands will read it as a part of them",
            stacklevel=1,  # once, though both this function and write_images check
        )
    check_folder(path, overwrite=overwrite, suffix=WRITTEN_AS)
    written: dict[Path, str] = {}
    for name in like.names:
        other = written.setdefault(Path(name).with_suffix(WRITTEN_AS), name)
        if other != name:
            raise ValueError(f"{other!r} and {name!r} differ by their suffix only: both would be written as PNG")


def write_images(path: str | PathLike[str], levels: np.ndarray, like: ImageSet, *, overwrite: bool = False) -> None:
    """Write images in the form of the set they were made from: a folder of PNG files of the same names, or an array.

    Args:
        path: the folder or file to write.
        levels: (N, C, H, W), uint8.
        like: the set whose names and layout are used.
        overwrite: replace a file, or a folder of nothing but PNG files, at ``path``.

    Raises:
        ValueError: as :func:`check_target`.
        OSError: if it cannot be written; nothing partial is left.
    """
    path = Path(path)
    check_target(path, like, overwrite=overwrite)
    if like.layout == "folder":
        with replacing(path) as partial:
            partial.mkdir()
            for image, name in zip(levels, like.names, strict=True):
                target = (partial / name).with_suffix(WRITTEN_AS)
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(as_picture(image)).save(target)
        return
    arrays = {"NHW": levels[:, 0], "NHWC": np.moveaxis(levels, 1, -1), "NCHW": levels}
    buffer = io.BytesIO()
    if path.suffix == ".npz":
        np.savez_compressed(buffer, x=arrays[like.layout])
    else:
        np.save(buffer, arrays[like.layout])
    write_atomically(path, buffer.getvalue())


def _read_folder(folder: Path, channels: Sequence[int], exclude: str | PathLike[str] | None) -> ImageSet:
    paths = _listed(folder, channels, exclude)
    grey = None if {1, 3} <= set(channels) else 3 not in channels
    levels = _levels_of(paths, grey, paths[0])
    return ImageSet(levels, [str(path.relative_to(folder)) for path in paths], "folder", folder)


def _listed(folder: Path, channels: Sequence[int], exclude: str | PathLike[str] | None = None) -> list[Path]:
    """The image files of a folder that are to be read as images of these numbers of channels, at least one file."""
    paths = list(_image_files(folder, frozenset() if exclude is None else frozenset({Path(exclude).resolve()})))
    if not paths:
        raise ValueError(f"{str(folder)!r} holds no images ({', '.join(SUFFIXES)})")
    if not {1, 3} & set(channels):
        expected = " or ".join(map(str, channels))
        raise ValueError(f"{str(folder)!r} holds grey or RGB images, where {expected} channels are expected")
    return paths


def _levels_of(
    paths: Sequence[Path], grey: bool | None, first: Path, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Levels (N, C, H, W) of image files; with ``grey=None`` grey if all of them are.

    All must be of the ``size`` (W, H) of the image ``first``, by default the first of these.
    """
    images = [_read_file(path) for path in paths]
    size = size or images[0].size
    for path, image in zip(paths, images, strict=True):
        if image.size != size:
            found, expected = (f"{height} x {width}" for width, height in (image.size, size))
            raise ValueError(
                f"{str(path)!r} has {found} pixels, but {str(first)!r} has {expected}: all images must be of one size"
            )
    grey = all(image.mode == "L" for image in images) if grey is None else grey
    return np.stack(
        [
            _as_grey(path, image) if grey else np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
            for path, image in zip(paths, images, strict=True)
        ]
    )


def _image_files(folder: Path, excluded: frozenset[Path]) -> Iterator[Path]:
    """The image files of a folder and its subfolders, in order, without those in the real paths ``excluded``."""
    excluded = excluded | {folder.resolve()}  # a symbolic link to a folder above is not followed
    samples = {SAMPLES} if _is_run(folder) else set()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = folder / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if not _is_run(path) and path.resolve() not in excluded:
                    yield from _image_files(path, excluded)
            elif path.suffix.lower() in SUFFIXES and path.name not in samples:
                yield path


def _is_run(folder: Path) -> bool:
    """Whether ``train`` wrote this folder, whose pictures are samples of a model."""
    return (folder / METRICS).is_file() and any((folder / name).is_file() for name in (CHECKPOINT, MODEL))


def _read_file(path: Path) -> Image.Image:
    """The image in a file, upright, as grey (mode L) if the file is grey and as RGB otherwise."""
    try:
        if not path.is_file():  # opening a pipe would wait for a writer
            raise ValueError("not a file")
        with Image.open(path) as image:
            # MPO: a JPEG photograph together with previews of itself.
            if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
                raise ValueError(f"{frames} frames, where one image per file is expected")
            if _is_deep(image):
                raise ValueError("more than 8 bits per channel; convert it first")
            grey = image.mode in ("1", "L", "LA")
            upright: Image.Image = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                if upright.getchannel("A").getextrema()[0] != 255:
                    raise ValueError("it has transparent pixels; put it on an opaque background first")
            return upright.convert("L" if grey else "RGB")
    except Exception as error:  # for damaged files Pillow raises errors of many kinds
        raise ValueError(f"{str(path)!r} cannot be read as an image: {error}") from error


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether an image that is not loaded yet has more than 8 bits per channel, some of which Pillow would drop.

    A raw mode such as ``RGB;16B`` says so; that of a bitmap with 16 bits per pixel is ``BGR;16``.
    """
    if image.mode.startswith(("I", "F")):
        return True
    return any(re.search(r"\b(?!BGR;)\w+;16", str(tile[3])) for tile in image.tile)


def _as_grey(path: Path, image: Image.Image) -> np.ndarray:
    """Levels (1, H, W) of a grey image, or of an RGB one whose channels are equal."""
    levels = np.asarray(image)
    if levels.ndim == 2:
        return levels[None]
    if (levels != levels[..., :1]).any():
        raise ValueError(f"{str(path)!r} is in colour, where grey images are expected")
    return levels[None, ..., 0]
