"""Data sets by name or path: 8-bit images (N, C, H, W) in train, calibration and test splits.

Names: ``digits`` (scikit-learn's) and ``fashion-mnist-500`` (test images only), which need no download, and
``fashion-mnist`` and ``cifar-10`` (the official files, from a data directory or downloaded into it). Paths: a folder of
images, or an ``.npz``.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import zlib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pooch

from art_pixeldefend.files import write_atomically
from art_pixeldefend.image_files import ImageSet, LazyImages, as_nchw, open_images, read_arrays, read_images
from art_pixeldefend.validation import check_labels

DATA_DIR_VARIABLE = "ART_PIXELDEFEND_DATA"
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
FASHION_MNIST_CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CIFAR_10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_10_FOLDER = "cifar-10-batches-bin"
CIFAR_10_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
CIFAR_10_IMAGES = 10_000  # in each file


class Split(NamedTuple):
    """Labelled images.

    Args:
        x: levels (N, C, H, W), uint8.
        y: class numbers (N,), int64.
    """

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Labelled images in three disjoint splits: train, calibration and test.

    Density models are trained on the train split. P-values and thresholds are valid only if they are calibrated on
    images that the model has not seen: use :meth:`calibration`, and report results on :meth:`test`.

        >>> from art_pixeldefend import PixelCNNpp, datasets
        >>> data, model = datasets.load("digits"), PixelCNNpp.from_pretrained("digits")
        >>> len(data.x_train), len(data.x_calibration), len(data.x_test)
        (1258, 139, 400)
        >>> len(data.calibration(model).x), len(data.test(model).x)  # this model was trained on x_calibration, too
        (200, 200)

    Args:
        name: as given to :func:`load`.
        x_train, x_calibration, x_test: levels (N, C, H, W), uint8.
        y_train, y_calibration, y_test: class numbers (N,), int64; all zero where the source has no labels.
        classes: the names of the classes, in order; only "image" where the source has no labels.
        order: the positions in the source of the train images, followed by those of the calibration images.
        reserved: the number of test images, counted from the end, that calibrate models which were trained on the
            calibration split.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_calibration: np.ndarray
    y_calibration: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...]
    order: np.ndarray
    reserved: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.x_train.shape[1:]

    def calibration(self, *models: Any) -> Split:
        """Images for calibrating a detector or a threshold of ``models``, which none of them was trained on.

        For a model that was trained on ``x_train``, in whatever order, these are ``x_calibration``; its provenance says
        so, as the trainer of this package records number, :func:`fingerprint` and :func:`sample` of the training
        images. Any other model is assumed to have seen all training images, as the bundled ``digits``,
        ``fashion-mnist`` and ``fashion-mnist-40x5`` have: for them these are the last ``reserved`` test images, which
        must be in no particular order. So they are for the bundled ``cifar-10``, whose last run was trained on a part
        of ``x_train``.

        Args:
            models: image models. If all were made elsewhere and you trained them on ``x_train`` only, use
                ``x_calibration`` and ``y_calibration`` directly.
        """
        if self.held_out_from(*models):
            return Split(self.x_calibration, self.y_calibration)
        return self.reserve()

    def test(self, *models: Any) -> Split:
        """The test images that are not among :meth:`calibration` of ``models``."""
        count = len(self.x_test) - (0 if self.held_out_from(*models) else self.reserved)
        return Split(self.x_test[:count], self.y_test[:count])

    def reserve(self) -> Split:
        """The last ``reserved`` test images: unseen by every density model, and by every classifier."""
        start = len(self.x_test) - self.reserved
        return Split(self.x_test[start:], self.y_test[start:])

    def train_and_calibration(self) -> Split:
        """Train and calibration images together, in the order of the source: the official training images.

        The classifiers of the published tables are trained on these.
        """
        back = np.argsort(self.order)
        x, y = ((self.x_train, self.x_calibration), (self.y_train, self.y_calibration))
        return Split(np.concatenate(x)[back], np.concatenate(y)[back])

    def held_out_from(self, *models: Any) -> bool:
        """Whether, by their provenance, all ``models`` were trained on ``x_train`` without the calibration images."""
        return all(_trained_on_only(getattr(model, "provenance", None), self.x_train) for model in models)


def _trained_on_only(provenance: Any, x: np.ndarray) -> bool:
    """Whether these images are all that a model, and those it was started from, were trained on."""
    while isinstance(provenance, Mapping) and _trained_last_on(provenance, x):
        if "start" not in provenance:
            return True
        provenance = provenance["start"]  # of the model whose weights training began with
    return False


def _trained_last_on(provenance: Mapping[str, Any], x: np.ndarray) -> bool:
    """Whether a model's last run was trained on these images, in whatever order.

    In the same order they have the same :func:`fingerprint`; in another one, the same number and :func:`sample`.
    """
    count = provenance.get("training_images")
    if count not in (None, len(x)):
        return False
    return provenance.get(FINGERPRINT) == fingerprint(x) or (count is not None and provenance.get(SAMPLE) == sample(x))


FINGERPRINT = "training_images_sha256"  # the entry of a model's provenance


def fingerprint(x: np.ndarray) -> str:
    """A SHA-256 of images (N, C, H, W), uint8, and their shape; the order of the images matters."""
    digest = hashlib.sha256(repr(tuple(map(int, x.shape))).encode())
    digest.update(np.ascontiguousarray(x).data)
    return digest.hexdigest()


SAMPLE = "training_images_sample"  # the entry of a model's provenance
SAMPLED = 256


def sample(x: np.ndarray) -> list[str]:
    """Identify some of the images (N, C, H, W), uint8: the first 64 bits of the 256 smallest SHA-256 of single images.

    An image has the same hash wherever it is, so that a list of a few kilobytes tells images of a training set, or a
    part of one; see :func:`training_images_in`.
    """
    return sorted(_image_hash(image) for image in x)[:SAMPLED]


def training_images_in(x: np.ndarray, model: Any) -> int:
    """Count images that are known to be training images of ``model``, a lower bound.

    The trainer records a :func:`fingerprint` of the training images and a :func:`sample` of them. A positive result is
    certain, but an image outside the sample is found only if ``x`` is the whole training set: of M training images
    among N, M 256 / N are found on average. Of the training images of bundled models without such a list, those of
    ``digits`` are identified by every fourth hash and those of ``fashion-mnist`` by every 32nd.

    Args:
        x: levels (N, C, H, W), uint8.
        model: an image model. The models that its training started from count as well.
    """
    provenance, found = getattr(model, "provenance", None), 0
    hashes = [_image_hash(image) for image in x]
    while isinstance(provenance, Mapping):
        if _trained_last_on(provenance, x):
            return len(x)
        known = provenance[SAMPLE] if SAMPLE in provenance else _official_sample(provenance)
        found = max(found, len(set(known).intersection(hashes)) if isinstance(known, list) else 0)
        provenance = provenance.get("start")
    return found


def _official_sample(provenance: Mapping[str, Any]) -> list[str] | None:
    """As :func:`sample`, of the official training images that a model was trained on: all, or the training split."""
    key = f"{provenance.get('dataset')}-{provenance.get('training_images')}"
    return _official_samples().get(key)


@cache
def _official_samples() -> dict[str, list[str]]:
    arrays = read_arrays(Path(__file__).parent / "samples" / "training-images.npz")
    return {key: [f"{value:016x}" for value in values.tolist()] for key, values in arrays.items()}


def _image_hash(image: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()[:16]


def load(name: str | PathLike[str], data_dir: str | PathLike[str] | None = None, *, download: bool = True) -> Dataset:
    """Load the data set of this name, or at this path.

    The calibration split is a tenth of the training images, chosen by a hash of their pixels, so that it does not
    depend on the order of the images.

    Args:
        name: ``digits``, ``fashion-mnist``, ``fashion-mnist-500`` (the first 500 test images of ``fashion-mnist`` and
            no others), ``cifar-10``, a folder of images of one size, or an ``.npz`` of ``x_train`` and optionally
            ``x_calibration``, ``x_test`` (uint8, any usual layout) and ``y_train``, ``y_calibration``, ``y_test``
            (class numbers or one-hot). Without test images, a tenth of all is test.
        data_dir: where the official files are, or are downloaded to: their own folder or the one above it; by default
            the environment variable ``ART_PIXELDEFEND_DATA``, else a folder in the user's cache.
        download: fetch missing files, and check them against the official checksums.

    Raises:
        ValueError: for an unknown name, or a file that is truncated or of another kind.
        FileNotFoundError: if official files are missing and may not, or cannot, be downloaded.
    """
    if name in NAMED:
        folder = Path(data_dir or os.environ.get(DATA_DIR_VARIABLE) or pooch.os_cache("art-pixeldefend"))
        return NAMED[str(name)](folder, download)
    path = Path(name)
    if path.is_dir():
        x = read_images(path).levels
        return _dataset(str(name), *_without_a_tenth(Split(x, np.zeros(len(x), np.int64))), ("image",))
    if path.suffix == ".npz" and path.is_file():
        return _npz(path)
    found = repr(str(name)) if path.exists() else f"{str(name)!r}, which does not exist"
    raise ValueError(f"name must be one of {', '.join(NAMED)}, a folder of images or an .npz file, got {found}")


def read(
    source: str | PathLike[str],
    model: Any,
    data_dir: str | PathLike[str] | None = None,
    *,
    exclude: str | PathLike[str] | None = None,
) -> ImageSet:
    """Read images for a model: the test images of a data set, or all images of a folder or an array file.

    Args:
        source: a data set's name, or a path as for :func:`read_images`.
        model: an image model; images are grey or RGB as it is, and must be of its size.
        data_dir: as for :func:`load`.
        exclude: as for :func:`read_images`.

    Raises:
        ValueError, FileNotFoundError: as :func:`load` and :func:`read_images`; for images of another shape.
    """
    if source in NAMED:
        found = _numbered(load(source, data_dir).x_test)
    else:
        found = read_images(source, model.image_shape[:1], exclude=exclude)
    _check_shape(source, found.levels, model.image_shape)
    return found


def _check_shape(source: str | PathLike[str], levels: np.ndarray, image_shape: tuple[int, int, int]) -> None:
    if levels.shape[1:] != image_shape:
        shape, expected = (" x ".join(map(str, shape)) for shape in (levels.shape[1:], image_shape))
        raise ValueError(f"the images of {str(source)!r} must be {expected} (C x H x W) for this model, got {shape}")


def open_stream(source: str | PathLike[str], *models: Any, data_dir: str | PathLike[str] | None = None) -> LazyImages:
    """Find images to be tested by a detector of ``models``, which are read when they are needed.

    Of a data set these are :meth:`Dataset.test`, of a folder or array file all images.

    Args:
        source: as for :func:`read`.
        models: image models of one image shape, at least one.
        data_dir: as for :func:`load`.

    Raises:
        ValueError, FileNotFoundError: as :func:`read`; for single images when they are read.
    """
    shape = models[0].image_shape
    if source in NAMED:
        x = load(source, data_dir).test(*models).x
        found = LazyImages([str(i) for i in range(len(x))], lambda start, stop: x[start:stop])
    else:
        found = open_images(source, shape[0])

    def read(start: int, stop: int) -> np.ndarray:
        levels = found.read(start, stop)
        _check_shape(source, levels, shape)
        return levels

    read(0, min(1, len(found.names)))
    return LazyImages(found.names, read)


def read_calibration(
    source: str | PathLike[str], *models: Any, data_dir: str | PathLike[str] | None = None
) -> ImageSet:
    """Read images that calibrate a detector of ``models``, none of which may have been trained on them.

    Of a data set, and of the folder that the models were trained on, these are :meth:`Dataset.calibration`; of any
    other folder or array file all images. ``total`` counts all images of a data set or of the models' folder.

    Args:
        source: what :func:`load` or :func:`read_images` accepts.
        models: image models, at least one.
        data_dir: as for :func:`load`.

    Raises:
        ValueError, FileNotFoundError: as :func:`load` and :func:`read`.
    """
    path = Path(source)
    if source in NAMED or (path.suffix == ".npz" and path.is_file() and "x_train" in read_arrays(path)):
        data = load(source, data_dir)
    elif not path.is_dir() or not (data := load(path)).held_out_from(*models):
        return read(source, models[0])
    total = sum(map(len, (data.x_train, data.x_calibration, data.x_test)))
    return replace(_numbered(data.calibration(*models).x), total=total)


def _numbered(levels: np.ndarray) -> ImageSet:
    return ImageSet(levels, [str(i) for i in range(len(levels))], "NCHW")


def _dataset(
    name: str,
    train: Split,
    test: Split,
    classes: tuple[str, ...],
    calibration: Split | None = None,
    reserved: int | None = None,
) -> Dataset:
    """Separate calibration images from the training images, unless they are given.

    ``reserved`` is by default a fifth of the test images.
    """
    order = np.arange(len(train.x) + (len(calibration.x) if calibration else 0))
    if calibration is None:
        chosen = _smallest_hashes(train.x)
        order = np.concatenate([np.flatnonzero(~chosen), np.flatnonzero(chosen)])
        calibration, train = (Split(train.x[which], train.y[which]) for which in (chosen, ~chosen))
    reserved = len(test.x) // 5 if reserved is None else reserved
    return Dataset(name, *train, *calibration, *test, classes, order, reserved)


def _smallest_hashes(x: np.ndarray) -> np.ndarray:
    """Mark the tenth of the images (N, C, H, W) whose bytes have the smallest SHA-256; ties go to the first."""
    digests = [hashlib.sha256(image.tobytes()).digest() for image in x]
    chosen = np.zeros(len(x), bool)
    chosen[sorted(range(len(x)), key=digests.__getitem__)[: len(x) // 10]] = True
    return chosen


# Named sets


def _digits(data_dir: Path, download: bool) -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # scikit-learn's are 0..16
    order = np.random.default_rng(0).permutation(len(levels))
    x, y = levels[order], digits.target[order].astype(np.int64)
    train, test = Split(x[:1397], y[:1397]), Split(x[1397:], y[1397:])
    return _dataset("digits", train, test, tuple("0123456789"), reserved=200)


def _fashion_mnist(data_dir: Path, download: bool) -> Dataset:
    folder, arrays = _folder(data_dir, "fashion-mnist", FASHION_MNIST_MD5), {}
    for file, md5 in FASHION_MNIST_MD5.items():
        path = folder / file
        if not path.is_file():
            _download(FASHION_MNIST_URL + file, md5, path, download)
        arrays[file] = _idx(path)
    x_train, y_train, x_test, y_test = (arrays[file] for file in FASHION_MNIST_MD5)
    for images, labels, count in ((x_train, y_train, 60_000), (x_test, y_test, 10_000)):
        if images.shape != (count, 28, 28) or labels.shape != (count,):
            raise ValueError(f"fashion-mnist: expected {count} images of 28 x 28, got {images.shape}, {labels.shape}")
    train, test = (Split(x[:, None], y.astype(np.int64)) for x, y in ((x_train, y_train), (x_test, y_test)))
    return _dataset("fashion-mnist", train, test, FASHION_MNIST_CLASSES)


def _fashion_mnist_500(data_dir: Path, download: bool) -> Dataset:
    test = _arrays(read_arrays(Path(__file__).parent / "samples" / "fashion-mnist-500.npz"), "test")
    none = Split(test.x[:0], test.y[:0])
    return _dataset("fashion-mnist-500", none, test, FASHION_MNIST_CLASSES, reserved=200)


def _cifar_10(data_dir: Path, download: bool) -> Dataset:
    folder = _folder(data_dir, CIFAR_10_FOLDER, CIFAR_10_FILES)
    if missing := [file for file in CIFAR_10_FILES if not (folder / file).is_file()]:
        archive = data_dir / "cifar-10-binary.tar.gz"
        _download(CIFAR_10_URL, CIFAR_10_MD5, archive, download)
        _extract(archive, folder, missing)
    size = CIFAR_10_IMAGES * 3073
    batches = []
    for path in (folder / file for file in CIFAR_10_FILES):
        data = np.fromfile(path, dtype=np.uint8)
        if data.size != size:
            raise ValueError(
                f"{str(path)!r} must have {size} bytes, got {data.size}: delete it, and it is extracted again"
            )
        batches.append(data.reshape(CIFAR_10_IMAGES, 3073))
    data = np.concatenate(batches)
    x, y = data[:, 1:].reshape(-1, 3, 32, 32), data[:, 0].astype(np.int64)
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    end = 5 * CIFAR_10_IMAGES
    return _dataset("cifar-10", Split(x[:end], y[:end]), Split(x[end:], y[end:]), classes)


NAMED: dict[str, Callable[[Path, bool], Dataset]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "fashion-mnist-500": _fashion_mnist_500,
    "cifar-10": _cifar_10,
}


def _folder(data_dir: Path, name: str, files: Collection[str]) -> Path:
    """The folder of a set's official files: ``data_dir`` itself if some are there, else its subfolder ``name``."""
    inside = data_dir / name
    return data_dir if not inside.is_dir() and any((data_dir / file).is_file() for file in files) else inside


def _download(url: str, md5: str, path: Path, allowed: bool) -> None:
    """Download one official file, unless it is there; pooch checks it and moves it into place."""
    if path.is_file() and pooch.file_hash(str(path), "md5") == md5:
        return
    advice = f"put the official files there, or name their folder by data_dir or {DATA_DIR_VARIABLE}"
    if not allowed:
        raise FileNotFoundError(f"{str(path)!r} is missing: {advice}")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        pooch.retrieve(url, f"md5:{md5}", fname=path.name, path=path.parent, progressbar=True)
    except (OSError, ValueError) as error:
        for folder in made:
            with suppress(OSError):  # another process may have put files there
                folder.rmdir()
        raise FileNotFoundError(f"{str(path)!r} is missing: {advice}; the download failed: {error}") from error


def _extract(archive: Path, folder: Path, files: Collection[str]) -> None:
    """Write the named files of a tar archive into ``folder``, each atomically.

    (``pooch.Untar`` writes in place: an interruption leaves a truncated file, and other processes read it meanwhile.)
    """
    with tarfile.open(archive) as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            if name in files and (content := tar.extractfile(member)) is not None:
                write_atomically(folder / name, content.read())


def _idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes: two zeros, type 8, number of axes, their sizes, the data."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is truncated or not a gzip file: {error}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{str(path)!r} is not an IDX file of unsigned bytes")
    start = 4 + 4 * data[3]
    shape = np.frombuffer(data[4:start], dtype=">u4").astype(int)
    if len(data) != start + shape.prod():
        raise ValueError(f"{str(path)!r} is truncated: {len(data) - start} bytes for an array of {tuple(shape)}")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape).copy()


# Users' own images


def _npz(path: Path) -> Dataset:
    arrays = read_arrays(path)
    if "x_train" not in arrays:
        raise ValueError(f"{str(path)!r} must hold an array x_train, got {sorted(arrays) or 'nothing'}")
    train = _arrays(arrays, "train")
    shape = train.x.shape[1:]
    calibration = _arrays(arrays, "calibration", shape) if "x_calibration" in arrays else None
    classes = _classes(train.y)
    train, test = (train, _arrays(arrays, "test", shape)) if "x_test" in arrays else _without_a_tenth(train)
    return _dataset(str(path), train, test, classes, calibration)


def _arrays(arrays: Mapping[str, np.ndarray], split: str, shape: tuple[int, ...] | None = None) -> Split:
    """The images of one split, checked, with their labels; zeros where there are none."""
    x = as_nchw(f"x_{split}", arrays[f"x_{split}"])
    if shape is not None and x.shape[1:] != shape:
        raise ValueError(f"x_{split} must have images of x_train's shape {shape}, got {x.shape[1:]}")
    y = arrays.get(f"y_{split}")
    return Split(x, np.zeros(len(x), np.int64) if y is None else check_labels(f"y_{split}", y, len(x)))


def _classes(y: np.ndarray) -> tuple[str, ...]:
    return tuple(map(str, range(int(y.max()) + 1))) if len(y) and y.max() else ("image",)


def _without_a_tenth(images: Split) -> tuple[Split, Split]:
    """Shuffle images, and separate a tenth of them as test images, at least one of two."""
    order = np.random.default_rng(0).permutation(len(images.x))
    held_out = max(1, len(order) // 10) if len(order) > 1 else 0
    rest, tenth = (Split(images.x[which], images.y[which]) for which in (order[held_out:], order[:held_out]))
    return rest, tenth
