"""Data sets by name or path, as 8-bit levels in NCHW.

Names: ``digits`` (scikit-learn's, embedded), ``fashion-mnist``, ``cifar-10`` (the official files, from a data directory
or downloaded into it). Paths: a folder of images, an ``.npz``.
"""

from __future__ import annotations

import gzip
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import pooch

from art_pixeldefend.image_files import as_nchw, read_arrays, read_images

DATA_DIR_VARIABLE = "ART_PIXELDEFEND_DATA"
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
CIFAR_10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_10_FOLDER = "cifar-10-batches-bin"


@dataclass(frozen=True)
class Dataset:
    """Images and labels, split.

    Args:
        name: as it was asked for.
        x_train, x_test: levels (N, C, H, W), uint8.
        y_train, y_test: class numbers (N,), int64; all zeros where the source has no labels.
        classes: their names, in order; one, "image", where the source has no labels.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.x_train.shape[1:]


def load(name: str | PathLike[str], data_dir: str | PathLike[str] | None = None, *, download: bool = True) -> Dataset:
    """The data set of this name, or at this path.

    Args:
        name: ``digits``, ``fashion-mnist``, ``cifar-10``, a folder of images of one size, or an ``.npz`` of
            ``x_train`` and, as far as there are any, ``y_train``, ``x_test``, ``y_test`` (uint8, any usual layout).
        data_dir: where the official files are, or shall be put; by default the environment variable
            ``ART_PIXELDEFEND_DATA``, else a folder in the user's cache.
        download: fetch what is missing, and check it against the official checksums.

    Raises:
        ValueError: for an unknown name, or a file that is cut short or not what it should be.
        FileNotFoundError: if the official files are missing and may not, or cannot, be downloaded.
    """
    if name in NAMED:
        folder = Path(data_dir or os.environ.get(DATA_DIR_VARIABLE) or pooch.os_cache("art-pixeldefend"))
        return NAMED[str(name)](folder, download)
    path = Path(name)
    if path.is_dir():
        return _split(str(name), read_images(path).levels)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path)
    raise ValueError(f"name must be one of {', '.join(NAMED)}, a folder of images or an .npz file, got {str(name)!r}")


# Named sets


def _digits(folder: Path, download: bool) -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # scikit-learn's are 0..16
    order = np.random.default_rng(0).permutation(len(levels))
    x, y = levels[order], digits.target[order].astype(np.int64)
    return Dataset("digits", x[:1397], y[:1397], x[1397:], y[1397:], tuple("0123456789"))


def _fashion_mnist(folder: Path, download: bool) -> Dataset:
    arrays = {}
    for file, md5 in FASHION_MNIST_MD5.items():
        path = folder / "fashion-mnist" / file
        if not path.is_file():
            _download(FASHION_MNIST_URL + file, md5, path, download)
        arrays[file] = _idx(path)
    x_train, y_train, x_test, y_test = (arrays[file] for file in FASHION_MNIST_MD5)
    for images, labels, count in ((x_train, y_train, 60_000), (x_test, y_test, 10_000)):
        if images.shape != (count, 28, 28) or labels.shape != (count,):
            raise ValueError(f"fashion-mnist: expected {count} images of 28 x 28, got {images.shape}, {labels.shape}")
    classes = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    return Dataset(
        "fashion-mnist", x_train[:, None], y_train.astype(np.int64), x_test[:, None], y_test.astype(np.int64), classes
    )


def _cifar_10(folder: Path, download: bool) -> Dataset:
    files = [
        folder / CIFAR_10_FOLDER / f"{name}.bin" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    ]
    if not all(path.is_file() for path in files):
        archive = folder / "cifar-10-binary.tar.gz"
        _download(CIFAR_10_URL, CIFAR_10_MD5, archive, download)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    batches = []
    for path in files:
        data = np.fromfile(path, dtype=np.uint8)
        if data.size != 10_000 * 3073:
            raise ValueError(f"{str(path)!r} is cut short: expected {10_000 * 3073} bytes, got {data.size}")
        batches.append(data.reshape(10_000, 3073))
    data = np.concatenate(batches)
    x, y = data[:, 1:].reshape(-1, 3, 32, 32), data[:, 0].astype(np.int64)
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    return Dataset("cifar-10", x[:50_000], y[:50_000], x[50_000:], y[50_000:], classes)


NAMED: dict[str, Callable[[Path, bool], Dataset]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar-10": _cifar_10,
}


def _download(url: str, md5: str, path: Path, allowed: bool) -> None:
    """Fetch one official file; pooch checks it and puts it in place whole."""
    advice = f"put the official files there, or name their folder by data_dir or {DATA_DIR_VARIABLE}"
    if not allowed:
        raise FileNotFoundError(f"{str(path)!r} is missing: {advice}")
    try:
        pooch.retrieve(url, f"md5:{md5}", fname=path.name, path=path.parent, progressbar=True)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{str(path)!r} is missing and cannot be downloaded ({error}): {advice}") from error


def _idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes: two zeros, type 8, number of axes, their sizes, the data."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is cut short or no gzip file: {error}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{str(path)!r} is no IDX file of unsigned bytes")
    start = 4 + 4 * data[3]
    shape = np.frombuffer(data[4:start], dtype=">u4").astype(int)
    if len(data) != start + shape.prod():
        raise ValueError(f"{str(path)!r} is cut short: {len(data) - start} bytes for an array of {tuple(shape)}")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape).copy()


# Users' own images


def _npz(path: Path) -> Dataset:
    arrays = read_arrays(path)
    if "x_train" not in arrays:
        raise ValueError(f"{str(path)!r} must hold an array x_train, got {sorted(arrays) or 'nothing'}")
    x = as_nchw("x_train", arrays["x_train"])
    y = _labels("y_train", arrays.get("y_train"), len(x))
    if "x_test" not in arrays:
        return _split(str(path), x, y)
    x_test = as_nchw("x_test", arrays["x_test"])
    if x_test.shape[1:] != x.shape[1:]:
        raise ValueError(f"x_test must have images of x_train's shape {x.shape[1:]}, got {x_test.shape[1:]}")
    y_test = _labels("y_test", arrays.get("y_test"), len(x_test))
    return Dataset(str(path), x, y, x_test, y_test, _classes(y))


def _labels(name: str, labels: np.ndarray | None, count: int) -> np.ndarray:
    if labels is None:
        return np.zeros(count, np.int64)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer) or (count and labels.min() < 0):
        raise ValueError(f"{name} must be {count} class numbers, got {labels.dtype} of shape {labels.shape}")
    return labels.astype(np.int64)


def _classes(y: np.ndarray) -> tuple[str, ...]:
    return tuple(map(str, range(int(y.max()) + 1))) if len(y) and y.max() else ("image",)


def _split(name: str, x: np.ndarray, y: np.ndarray | None = None) -> Dataset:
    """Every tenth image of a shuffled order becomes test data, at least one of two."""
    y = np.zeros(len(x), np.int64) if y is None else y
    order = np.random.default_rng(0).permutation(len(x))
    held_out = max(1, len(x) // 10) if len(x) > 1 else 0
    train, test = order[held_out:], order[:held_out]
    return Dataset(name, x[train], y[train], x[test], y[test], _classes(y))
